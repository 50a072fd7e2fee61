// What Swift cannot import from the system headers: inline functions that need their macros, variadic functions,
// and wrappers the C library of Debian 12 lacks. No logic.
#pragma once

// fd_set has other names with _GNU_SOURCE, and Swift's Glibc module, which is made without it, has it as well.
#include <sys/select.h>
#undef _FEATURES_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/fs.h>
#include <linux/netlink.h>
#include <linux/sockios.h>
#include <malloc.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <spawn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

// open(2) is variadic.
static inline int qbd_open(const char *path, int flags, mode_t mode) { return open(path, flags, mode); }
static inline int qbd_openat(int dir, const char *path, int flags, mode_t mode) { return openat(dir, path, flags, mode); }

// fcntl(2) is variadic.
static inline int qbd_duplicate(int fd) { return fcntl(fd, F_DUPFD_CLOEXEC, 0); }
static inline int qbd_set_flags(int fd, int flags) { return fcntl(fd, F_SETFL, flags); }

// renameat2(2) with RENAME_NOREPLACE, which need _GNU_SOURCE.
int qbd_rename_new(int old_dir, const char *old_path, int new_dir, const char *new_path);

// epoll_data_t is a union in a packed struct; epoll_pwait2 takes nanoseconds (Linux 5.11).
static inline int qbd_epoll_ctl(int epfd, int op, int fd, uint32_t events, uint64_t data) {
    struct epoll_event event = {.events = events, .data = {.u64 = data}};
    return epoll_ctl(epfd, op, fd, &event);
}
static inline int qbd_epoll_wait(int epfd, struct epoll_event *events, int capacity, const struct timespec *timeout) {
    return epoll_pwait2(epfd, events, capacity, timeout, NULL);
}
static inline uint64_t qbd_epoll_data(const struct epoll_event *event) { return event->data.u64; }
static inline uint32_t qbd_epoll_events(const struct epoll_event *event) { return event->events; }

// glibc has two strerror_r behind one name; this takes the GNU one and always fills the buffer.
static inline void qbd_strerror(int code, char *buffer, size_t size) {
    const char *text = strerror_r(code, buffer, size);
    if (text != buffer) {
        strncpy(buffer, text, size - 1);
        buffer[size - 1] = 0;
    }
}

// Function-like macros.
// A compiler builtin. Asks for the lines of a stretch of memory all at once.
static inline void qbd_prefetch(const void *base, size_t count) {
    for (size_t offset = 0; offset < count; offset += 64) __builtin_prefetch((const char *)base + offset);
}
static inline void *qbd_map_failed(void) { return MAP_FAILED; }
static inline int qbd_is_ignored(const struct sigaction *action) { return action->sa_handler == SIG_IGN; }

// liburing's queue access is inline functions over macros with barriers.
static inline struct io_uring_sqe *qbd_ring_get_sqe(struct io_uring *ring) { return io_uring_get_sqe(ring); }
static inline struct io_uring_cqe *qbd_ring_peek(struct io_uring *ring) {
    struct io_uring_cqe *cqe = NULL;
    return io_uring_peek_cqe(ring, &cqe) == 0 ? cqe : NULL;
}
static inline void qbd_ring_seen(struct io_uring *ring, struct io_uring_cqe *cqe) { io_uring_cqe_seen(ring, cqe); }

// cachestat(2), of Linux 6.5: pages of a range of a file that are in the page cache, also those that are still being read
// and those that could not be; -1 with errno.
long qbd_cached_pages(int fd, uint64_t offset, uint64_t length);
// preadv2(2) with RWF_NOWAIT, which needs _GNU_SOURCE.
ssize_t qbd_read_now(int fd, void *bytes, size_t count, uint64_t offset);
// fcntl(2) is variadic, and the command needs _GNU_SOURCE. The size it has then, bytes, or -1.
int qbd_set_pipe_size(int fd, int bytes);

// ioctl(2) is variadic, and its numbers are function-like macros.
static inline int qbd_socket_unread(int fd) {
    int bytes = 0;
    return ioctl(fd, SIOCOUTQ, &bytes) == 0 ? bytes : 0;
}
static inline int qbd_blkrrpart(int fd) { return ioctl(fd, BLKRRPART); }
static inline int qbd_blkflsbuf(int fd) { return ioctl(fd, BLKFLSBUF, 0); }
// Of an empty file, where the file system knows that (btrfs).
static inline void qbd_write_in_place(int fd) {
    int flags = 0;
    if (ioctl(fd, FS_IOC_GETFLAGS, &flags) != 0) return;
    flags |= FS_NOCOW_FL;
    ioctl(fd, FS_IOC_SETFLAGS, &flags);
}
static inline int qbd_blkroset(int fd, int read_only) { return ioctl(fd, BLKROSET, &read_only); }

// prctl(2) is variadic.
static inline int qbd_set_io_flusher(void) { return prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0); }
// mallopt(3) is not in Swift's Glibc module. Blocks of so many bytes and more are the kernel's again when they are freed.
static inline int qbd_set_malloc_mmap_threshold(int bytes) { return mallopt(M_MMAP_THRESHOLD, bytes); }
// How often the calling thread has waited for something; being preempted does not count.
long qbd_thread_waits(void);
static inline pid_t qbd_gettid(void) { return gettid(); }
// tgkill(2): a thread that has ended is an error, where pthread_kill(3) may crash.
static inline int qbd_signal_thread(pid_t thread, int signal) { return tgkill(getpid(), thread, signal); }
static inline int qbd_set_timer_slack(unsigned long nanoseconds) { return prctl(PR_SET_TIMERSLACK, nanoseconds, 0, 0, 0); }

// makedev(3) is a function-like macro.
static inline dev_t qbd_makedev(uint32_t major, uint32_t minor) { return makedev(major, minor); }

// A file's type and device number as this host knows them, without asking the server of a network file system.
int qbd_known_type(const char *path, uint32_t *mode, uint32_t *major, uint32_t *minor);

// Declared for _GNU_SOURCE only, which Swift's Glibc module does not know.
extern int posix_spawn_file_actions_addchdir_np(posix_spawn_file_actions_t *actions, const char *path);
extern int posix_spawn_file_actions_addclosefrom_np(posix_spawn_file_actions_t *actions, int first);
static inline int qbd_spawn_chdir(posix_spawn_file_actions_t *actions, const char *path) {
    return posix_spawn_file_actions_addchdir_np(actions, path);
}
static inline int qbd_spawn_closefrom(posix_spawn_file_actions_t *actions, int first) {
    return posix_spawn_file_actions_addclosefrom_np(actions, first);
}
extern int sem_clockwait(sem_t *semaphore, clockid_t clock, const struct timespec *deadline);
static inline int qbd_semaphore_wait(sem_t *semaphore, const struct timespec *deadline) {
    return sem_clockwait(semaphore, CLOCK_MONOTONIC, deadline);
}
