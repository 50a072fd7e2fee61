#include "CLinux.h"

#include <sys/resource.h>

// statx(2) and its flags need _GNU_SOURCE.
int qbd_known_type(const char *path, uint32_t *mode, uint32_t *major, uint32_t *minor) {
    struct statx status;
    if (statx(AT_FDCWD, path, AT_STATX_DONT_SYNC | AT_NO_AUTOMOUNT, STATX_TYPE, &status) != 0) return -1;
    *mode = status.stx_mode;
    *major = status.stx_rdev_major;
    *minor = status.stx_rdev_minor;
    return 0;
}

long qbd_thread_waits(void) {
    struct rusage usage;
    // RUSAGE_THREAD needs _GNU_SOURCE.
    return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_nvcsw : 0;
}
