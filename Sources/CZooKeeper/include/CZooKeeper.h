// ZooKeeper's own C client. Its blocking calls are declared for THREADED only, which is how the library that is linked
// was built. No logic.
#pragma once

#define THREADED
#include <zookeeper/zookeeper.h>

// Not const, though nobody changes it.
static inline struct ACL_vector qbd_zookeeper_open_acl(void) { return ZOO_OPEN_ACL_UNSAFE; }
