#include "CLinux.h"

#include <sys/resource.h>

long qbd_thread_waits(void) {
    struct rusage usage;
    // RUSAGE_THREAD needs _GNU_SOURCE.
    return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_nvcsw : 0;
}
