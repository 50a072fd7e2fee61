#include "CLinux.h"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>

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

// cachestat(2), struct cachestat_range and struct cachestat of the kernel's linux/mman.h; its number is the same on all
// architectures.
enum { CACHESTAT = 451 };

int qbd_is_in_memory(int fd, uint64_t offset, uint64_t length) {
    struct { uint64_t offset, length; } range = {offset, length};
    struct { uint64_t cached, dirty, writeback, evicted, recently_evicted; } pages;
    if (syscall(CACHESTAT, fd, &range, &pages, 0) != 0) return -1;
    uint64_t page = (uint64_t)getpagesize();
    if (pages.cached != (offset + length - 1) / page - offset / page + 1) return 0;
    // Those that are still being read count as well; the last one comes last.
    char byte;
    struct iovec vector = {&byte, 1};
    return preadv2(fd, &vector, 1, (off_t)(offset + length - 1), RWF_NOWAIT) == 1;
}
