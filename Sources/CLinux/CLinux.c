#include "CLinux.h"

#include <stdio.h>
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

int qbd_set_pipe_size(int fd, int bytes) { return fcntl(fd, F_SETPIPE_SZ, bytes); }

// struct cachestat_range and struct cachestat of the kernel's linux/mman.h; the number is the same on all architectures.
enum { CACHESTAT = 451 };

long qbd_cached_pages(int fd, uint64_t offset, uint64_t length) {
    struct { uint64_t offset, length; } range = {offset, length};
    struct { uint64_t cached, dirty, writeback, evicted, recently_evicted; } pages;
    return syscall(CACHESTAT, fd, &range, &pages, 0) == 0 ? (long)pages.cached : -1;
}

ssize_t qbd_read_now(int fd, void *bytes, size_t count, uint64_t offset) {
    struct iovec vector = {bytes, count};
    return preadv2(fd, &vector, 1, (off_t)offset, RWF_NOWAIT);
}

int qbd_rename_new(int old_dir, const char *old_path, int new_dir, const char *new_path) {
    return renameat2(old_dir, old_path, new_dir, new_path, RENAME_NOREPLACE);
}
