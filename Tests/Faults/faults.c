// Runs a program and makes one of its system calls fail, be short, or be the last one before its death.
//
//     faults CONTROL NAME=FOLDER... -- PROGRAM ARGUMENT...
//
// Every call of the program, of any of its threads and children, that touches a file below one of the folders has a key:
// the call, its path with what differs from run to run replaced, and how many of that pair there have been since the tracer
// was armed. Operations of an io_uring have keys too. What is to happen, and to which key, is said by whoever else has the
// control file mapped (struct control, and faults.py); it may be said anew at any time.
//
// A filter of seccomp(2) stops the calls, and no others, so the program runs at its usual speed.

#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>

#if !defined(__linux__) || !defined(__x86_64__)

int main(void) {
    fputs("faults: only for Linux on x86-64, whose registers it changes\n", stderr);
    return 77;
}

#else

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/io_uring.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

enum { KEY = 512, LOG = 1 << 20 };
enum { RECORD, FAIL, SHORT, KILL_BEFORE, KILL_AFTER };

// The same in faults.py.
struct control {
    // Calls are counted, from 1 on, while this is not 0 and does not change.
    _Atomic uint32_t armed;
    uint32_t mode;
    int32_t error;
    // Whether the ring can be made to fail, as the kernel was seen to do.
    uint32_t ring;
    // The key was met, and it was done.
    _Atomic uint32_t hit;
    // The program.
    _Atomic int32_t pid;
    // Of waitpid(2), once it has ended.
    _Atomic int32_t status;
    // Whether `status` is there.
    _Atomic uint32_t ended;
    // Calls of ours so far, armed or not.
    _Atomic uint32_t calls;
    // Every io_uring_setup fails, as in a sandbox.
    uint32_t without_ring;
    char key[KEY];
    _Atomic uint32_t logged;
    char log[LOG];
};

static struct control *control;

static void die(const char *what) {
    fprintf(stderr, "faults: %s: %s\n", what, strerror(errno));
    exit(1);
}

// What is traced

enum kind { BY_PATH, BY_FD, TWO_PATHS, RING };

static const struct call {
    int number;
    enum kind kind;
    const char *name;
    // Argument with the descriptor of a folder, or -1; the path is the next one, or the first.
    int folder;
} calls[] = {
    {SYS_open, BY_PATH, "open", -1},
    {SYS_openat, BY_PATH, "openat", 0},
    {SYS_openat2, BY_PATH, "openat2", 0},
    {SYS_creat, BY_PATH, "creat", -1},
    {SYS_stat, BY_PATH, "stat", -1},
    {SYS_lstat, BY_PATH, "lstat", -1},
    {SYS_newfstatat, BY_PATH, "fstatat", 0},
    {SYS_statx, BY_PATH, "statx", 0},
    {SYS_statfs, BY_PATH, "statfs", -1},
    {SYS_access, BY_PATH, "access", -1},
    {SYS_faccessat, BY_PATH, "faccessat", 0},
    {SYS_faccessat2, BY_PATH, "faccessat", 0},
    {SYS_mkdir, BY_PATH, "mkdir", -1},
    {SYS_mkdirat, BY_PATH, "mkdirat", 0},
    {SYS_rmdir, BY_PATH, "rmdir", -1},
    {SYS_unlink, BY_PATH, "unlink", -1},
    {SYS_unlinkat, BY_PATH, "unlinkat", 0},
    {SYS_readlink, BY_PATH, "readlink", -1},
    {SYS_readlinkat, BY_PATH, "readlinkat", 0},
    {SYS_truncate, BY_PATH, "truncate", -1},
    {SYS_chmod, BY_PATH, "chmod", -1},
    {SYS_fchmodat, BY_PATH, "fchmodat", 0},
    {SYS_chown, BY_PATH, "chown", -1},
    {SYS_fchownat, BY_PATH, "fchownat", 0},
    {SYS_utimensat, BY_PATH, "utimensat", 0},
    {SYS_mknod, BY_PATH, "mknod", -1},
    {SYS_mknodat, BY_PATH, "mknodat", 0},
    {SYS_getxattr, BY_PATH, "getxattr", -1},
    {SYS_setxattr, BY_PATH, "setxattr", -1},
    {SYS_rename, TWO_PATHS, "rename", -1},
    {SYS_renameat, TWO_PATHS, "renameat", 0},
    {SYS_renameat2, TWO_PATHS, "renameat2", 0},
    {SYS_link, TWO_PATHS, "link", -1},
    {SYS_linkat, TWO_PATHS, "linkat", 0},
    {SYS_symlink, TWO_PATHS, "symlink", -1},
    {SYS_fstat, BY_FD, "fstat", 0},
    {SYS_fstatfs, BY_FD, "fstatfs", 0},
    {SYS_fchmod, BY_FD, "fchmod", 0},
    {SYS_fchown, BY_FD, "fchown", 0},
    {SYS_fgetxattr, BY_FD, "fgetxattr", 0},
    {SYS_fsetxattr, BY_FD, "fsetxattr", 0},
    {SYS_getdents64, BY_FD, "getdents64", 0},
    {SYS_read, BY_FD, "read", 0},
    {SYS_readv, BY_FD, "readv", 0},
    {SYS_pread64, BY_FD, "pread64", 0},
    {SYS_preadv, BY_FD, "preadv", 0},
    {SYS_preadv2, BY_FD, "preadv2", 0},
    {SYS_write, BY_FD, "write", 0},
    {SYS_writev, BY_FD, "writev", 0},
    {SYS_pwrite64, BY_FD, "pwrite64", 0},
    {SYS_pwritev, BY_FD, "pwritev", 0},
    {SYS_pwritev2, BY_FD, "pwritev2", 0},
    {SYS_lseek, BY_FD, "lseek", 0},
    {SYS_ftruncate, BY_FD, "ftruncate", 0},
    {SYS_fallocate, BY_FD, "fallocate", 0},
    {SYS_fsync, BY_FD, "fsync", 0},
    {SYS_fdatasync, BY_FD, "fdatasync", 0},
    {SYS_sync_file_range, BY_FD, "sync_file_range", 0},
    {SYS_syncfs, BY_FD, "syncfs", 0},
    {SYS_flock, BY_FD, "flock", 0},
    {SYS_fcntl, BY_FD, "fcntl", 0},
    {SYS_ioctl, BY_FD, "ioctl", 0},
    {SYS_copy_file_range, BY_FD, "copy_file_range", 2},
    {SYS_sendfile, BY_FD, "sendfile", 1},
    {SYS_splice, BY_FD, "splice", 0},
    {SYS_mmap, BY_FD, "mmap", 4},
    {SYS_fadvise64, BY_FD, "fadvise64", 0},
    {451, BY_FD, "cachestat", 0},
    {SYS_io_uring_setup, RING, "io_uring_setup", -1},
    {SYS_io_uring_enter, RING, "io_uring_enter", -1},
};
enum { CALLS = sizeof(calls) / sizeof(*calls) };

static const struct call *find(long number) {
    for (int i = 0; i < CALLS; i++)
        if (calls[i].number == number) return &calls[i];
    return NULL;
}

static void filter(void) {
    struct sock_filter program[CALLS + 5];
    int n = 0;
    program[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch));
    program[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 0, CALLS + 1);
    program[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (int i = 0; i < CALLS; i++)
        program[n++] = (struct sock_filter)BPF_JUMP(
            BPF_JMP | BPF_JEQ | BPF_K, (unsigned)calls[i].number, (unsigned char)(CALLS - i), 0);
    program[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    program[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRACE);
    struct sock_fprog filter = {(unsigned short)n, program};
    // Root needs no such promise, and the program may run others that have more rights.
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &filter) == 0) return;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) die("no new privileges");
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &filter) != 0) die("seccomp");
}

// The program's memory

static int read_memory(pid_t tid, uint64_t at, void *to, size_t count) {
    struct iovec local = {to, count}, remote = {(void *)at, count};
    return process_vm_readv(tid, &local, 1, &remote, 1, 0) == (ssize_t)count ? 0 : -1;
}

static int write_memory(pid_t tid, uint64_t at, const void *from, size_t count) {
    struct iovec local = {(void *)from, count}, remote = {(void *)at, count};
    return process_vm_writev(tid, &local, 1, &remote, 1, 0) == (ssize_t)count ? 0 : -1;
}

static int read_text(pid_t tid, uint64_t at, char *to, size_t capacity) {
    size_t done = 0;
    while (done < capacity - 1) {
        // Not beyond a page, which may be the last one.
        size_t piece = 4096 - (at + done) % 4096;
        if (piece > capacity - 1 - done) piece = capacity - 1 - done;
        if (read_memory(tid, at + done, to + done, piece) != 0) return -1;
        if (memchr(to + done, 0, piece)) return 0;
        done += piece;
    }
    to[done] = 0;
    return 0;
}

// Paths

static struct {
    const char *name, *path;
} folders[16];
static int folder_count;

// The path as it stands in a key: what differs from run to run is `#`. Returns 0 when it is in no folder of ours.
static int normalise(const char *path, char *to, size_t capacity) {
    // Read by the C library and by Swift's, which have to live with it.
    size_t all = strlen(path);
    if (strncmp(path, "/sys/devices/system/", 20) == 0 || strncmp(path, "/proc/sys/vm/", 13) == 0 ||
        (strncmp(path, "/proc/", 6) == 0 && all > 5 && strcmp(path + all - 5, "/maps") == 0))
        return 0;
    for (int i = 0; i < folder_count; i++) {
        size_t length = strlen(folders[i].path);
        if (strncmp(path, folders[i].path, length) != 0 || (path[length] != '/' && path[length] != 0)) continue;
        size_t n = (size_t)snprintf(to, capacity, "%s", folders[i].name);
        const char *rest = path + length;
        while (*rest && n < capacity - 1) {
            size_t hexadecimal = strspn(rest, "0123456789abcdef"), decimal = strspn(rest, "0123456789");
            int is_proc = strncmp(folders[i].path, "/proc", 5) == 0;
            if (hexadecimal >= 16 || decimal >= 6 || (is_proc && decimal > 0 && rest[-1] == '/')) {
                to[n++] = '#';
                rest += hexadecimal >= 16 ? hexadecimal : decimal;
            } else if (strcmp(rest, " (deleted)") == 0) {
                to[n++] = '!';
                break;
            } else {
                // A blank separates the parts of a key.
                to[n++] = *rest == ' ' || *rest == '\n' ? '_' : *rest;
                rest++;
            }
        }
        to[n] = 0;
        return 1;
    }
    return 0;
}

static int path_of_descriptor(pid_t tid, int descriptor, char *to, size_t capacity) {
    char link[64];
    if (descriptor == AT_FDCWD) {
        snprintf(link, sizeof(link), "/proc/%d/cwd", tid);
    } else {
        snprintf(link, sizeof(link), "/proc/%d/fd/%d", tid, descriptor);
    }
    ssize_t count = readlink(link, to, capacity - 1);
    if (count < 0) return -1;
    to[count] = 0;
    return 0;
}

// Leaves a path with no `/./`, `//` and no `/` at its end.
static void tidy(char *path) {
    char *to = path;
    for (char *from = path; *from;) {
        if (from[0] == '/' && (from[1] == '/' || from[1] == 0)) {
            from++;
        } else if (from[0] == '/' && from[1] == '.' && (from[2] == '/' || from[2] == 0)) {
            from += 2;
        } else {
            *to++ = *from++;
        }
    }
    *to = 0;
}

static uint64_t argument(const struct user_regs_struct *registers, int index) {
    switch (index) {
    case 0: return registers->rdi;
    case 1: return registers->rsi;
    case 2: return registers->rdx;
    case 3: return registers->r10;
    case 4: return registers->r8;
    default: return registers->r9;
    }
}

static int path_of_argument(
    pid_t tid, const struct user_regs_struct *registers, int folder, int path, char *to, size_t capacity) {
    char name[4096], base[4096];
    if (read_text(tid, argument(registers, path), name, sizeof(name)) != 0) return -1;
    if (name[0] == '/') {
        snprintf(to, capacity, "%s", name);
    } else {
        int descriptor = folder < 0 ? AT_FDCWD : (int)argument(registers, folder);
        if (path_of_descriptor(tid, descriptor, base, sizeof(base)) != 0) return -1;
        snprintf(to, capacity, "%.2000s%s%.2000s", base, name[0] ? "/" : "", name);
    }
    tidy(to);
    return 0;
}

// Keys

enum { SLOTS = 1 << 14 };
static struct {
    char key[KEY];
    uint32_t count;
} *seen;
static uint32_t counted;

static uint32_t occurrence(const char *key) {
    uint64_t hash = 14695981039346656037u;
    for (const char *c = key; *c; c++) hash = (hash ^ (unsigned char)*c) * 1099511628211u;
    for (uint32_t i = (uint32_t)hash % SLOTS;; i = (i + 1) % SLOTS) {
        if (seen[i].count == 0) snprintf(seen[i].key, KEY, "%s", key);
        if (seen[i].count == 0 || strcmp(seen[i].key, key) == 0) return ++seen[i].count;
    }
}

// Counts the key. Returns whether it is the one.
static int is_wanted(const char *key) {
    uint32_t armed = control->armed;
    if (armed == 0) return 0;
    if (armed != counted) {
        memset(seen, 0, SLOTS * sizeof(*seen));
        counted = armed;
    }
    char numbered[KEY + 16];
    int length = snprintf(numbered, sizeof(numbered), "%s %u", key, occurrence(key));
    if (control->mode == RECORD) {
        uint32_t at = control->logged;
        if (at + (uint32_t)length + 1 < LOG) {
            memcpy(control->log + at, numbered, (size_t)length);
            control->log[at + (uint32_t)length] = '\n';
            control->logged = at + (uint32_t)length + 1;
        }
        return 0;
    }
    return control->hit == 0 && strcmp(numbered, control->key) == 0;
}

// Whether fstatat(2) is asked about a descriptor, as fstat(3) does.
static int is_fstat(pid_t tid, const struct user_regs_struct *registers) {
    char first = 0;
    if (registers->orig_rax != SYS_newfstatat || !(registers->r10 & AT_EMPTY_PATH)) return 0;
    return registers->rsi == 0 || (read_memory(tid, registers->rsi, &first, 1) == 0 && first == 0);
}

static const char *detail(const struct call *call, const struct user_regs_struct *registers) {
    static char text[64];
    switch (call->number) {
    case SYS_open:
    case SYS_openat: {
        uint64_t flags = call->number == SYS_open ? registers->rsi : registers->rdx;
        if (flags & O_DIRECTORY) return ":folder";
        if (flags & O_CREAT) return flags & O_EXCL ? ":new" : ":create";
        return (flags & O_ACCMODE) == O_RDONLY ? "" : ":write";
    }
    case SYS_lseek:
        switch (registers->rdx) {
        case SEEK_DATA: return ":data";
        case SEEK_HOLE: return ":hole";
        default: return "";
        }
    case SYS_fallocate:
        if (registers->rsi & FALLOC_FL_PUNCH_HOLE) return ":punch";
        return registers->rsi & FALLOC_FL_ZERO_RANGE ? ":zero" : "";
    case SYS_fcntl:
    case SYS_ioctl: snprintf(text, sizeof(text), ":%u", (unsigned)registers->rsi); return text;
    case SYS_preadv2: return registers->r9 & RWF_NOWAIT ? ":nowait" : "";
    case SYS_flock: return registers->rsi & LOCK_NB ? ":now" : "";
    default: return "";
    }
}

// Returns 0 when the call is none of ours.
static int key_of(pid_t tid, const struct call *call, const struct user_regs_struct *registers, char *key) {
    char path[8192], normal[KEY - 64];
    const char *name = call->name;
    switch (call->kind) {
    case RING: snprintf(key, KEY, "%s -", name); return 1;
    case BY_FD:
        if (call->number == SYS_mmap && (registers->r10 & MAP_ANONYMOUS)) return 0;
        if (path_of_descriptor(tid, (int)argument(registers, call->folder), path, sizeof(path)) != 0) return 0;
        break;
    case BY_PATH:
    case TWO_PATHS:
        if (is_fstat(tid, registers)) {
            if (path_of_descriptor(tid, (int)registers->rdi, path, sizeof(path)) != 0) return 0;
            name = "fstat";
            break;
        }
        if (path_of_argument(tid, registers, call->folder, call->folder + 1, path, sizeof(path)) != 0) return 0;
        break;
    }
    if (!normalise(path, normal, sizeof(normal))) return 0;
    if (call->kind == TWO_PATHS) {
        int folder = call->folder < 0 || call->number == SYS_symlink ? -1 : 2;
        char second[8192], normal_second[KEY / 2] = "?";
        if (path_of_argument(tid, registers, folder, folder < 0 ? 1 : 3, second, sizeof(second)) == 0)
            normalise(second, normal_second, sizeof(normal_second));
        snprintf(key, KEY, "%s %.240s>%.200s", name, normal, normal_second);
    } else {
        snprintf(key, KEY, "%s%s %.400s", name, detail(call, registers), normal);
    }
    return 1;
}

// Rings

static struct ring {
    int descriptor;
    struct io_uring_params parameters;
    uint64_t queue, entries;
    // Up to which entry of its submission queue is counted.
    uint32_t counted;
} rings[64];
static int ring_count;

static struct ring *ring_of(int descriptor) {
    for (int i = ring_count - 1; i >= 0; i--)
        if (rings[i].descriptor == descriptor) return &rings[i];
    return NULL;
}

static const char *operation(const struct io_uring_sqe *entry) {
    switch (entry->opcode) {
    case IORING_OP_READ: return "ring-read";
    case IORING_OP_WRITE: return "ring-write";
    case IORING_OP_FSYNC: return "ring-fsync";
    case IORING_OP_FALLOCATE:
        return (entry->len & FALLOC_FL_PUNCH_HOLE) != 0   ? "ring-fallocate:punch"
               : (entry->len & FALLOC_FL_ZERO_RANGE) != 0 ? "ring-fallocate:zero"
                                                          : "ring-fallocate";
    default: return NULL;
    }
}

// The operation is replaced by none, whose result is the error: so nothing has to be changed between its completion and
// the program's look at it.
static int make_fail(struct io_uring_sqe *entry, int error) {
    uint64_t data = entry->user_data;
    memset(entry, 0, sizeof(*entry));
    entry->opcode = IORING_OP_NOP;
    entry->fd = -1;
    // nop_flags, IORING_NOP_INJECT_RESULT (Linux 6.10).
    entry->rw_flags = 1;
    entry->len = (uint32_t)-error;
    entry->user_data = data;
    return 0;
}

// Looks at what is about to be submitted. Returns whether the program is to die before or after that.
static int submit(pid_t tid, const struct user_regs_struct *registers) {
    struct ring *ring = ring_of((int)registers->rdi);
    if (!ring || !ring->queue || !ring->entries || control->armed == 0) return 0;
    uint32_t head, tail, mask;
    if (read_memory(tid, ring->queue + ring->parameters.sq_off.tail, &tail, 4) != 0 ||
        read_memory(tid, ring->queue + ring->parameters.sq_off.head, &head, 4) != 0 ||
        read_memory(tid, ring->queue + ring->parameters.sq_off.ring_mask, &mask, 4) != 0)
        return 0;
    if ((int32_t)(ring->counted - head) < 0) ring->counted = head;
    int dies = 0;
    for (; ring->counted != tail; ring->counted++) {
        uint32_t index;
        struct io_uring_sqe entry;
        if (read_memory(tid, ring->queue + ring->parameters.sq_off.array + (uint64_t)(ring->counted & mask) * 4, &index, 4))
            return 0;
        uint64_t at = ring->entries + (uint64_t)index * sizeof(entry);
        if (read_memory(tid, at, &entry, sizeof(entry)) != 0) return 0;
        char path[4096], normal[KEY - 64], key[KEY];
        const char *name = operation(&entry);
        if (!name || path_of_descriptor(tid, entry.fd, path, sizeof(path)) != 0) continue;
        if (!normalise(path, normal, sizeof(normal))) continue;
        snprintf(key, sizeof(key), "%s %.400s", name, normal);
        if (!is_wanted(key)) continue;
        if (control->mode == FAIL && control->ring) {
            make_fail(&entry, control->error);
            control->hit = write_memory(tid, at, &entry, sizeof(entry)) == 0;
        } else if (control->mode == SHORT && entry.len > 1 &&
                   (entry.opcode == IORING_OP_READ || entry.opcode == IORING_OP_WRITE)) {
            entry.len /= 2;
            control->hit = write_memory(tid, at, &entry, sizeof(entry)) == 0;
        } else if (control->mode == KILL_BEFORE || control->mode == KILL_AFTER) {
            dies = 1;
        }
    }
    return dies;
}

// Whether an operation can be made to fail as in `make_fail`.
static uint32_t can_inject(void) {
    struct io_uring_params parameters = {0};
    int ring = (int)syscall(SYS_io_uring_setup, 4, &parameters);
    if (ring < 0) return 0;
    size_t size = parameters.cq_off.cqes + parameters.cq_entries * sizeof(struct io_uring_cqe);
    char *queue = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
    struct io_uring_sqe *entries = mmap(
        NULL, parameters.sq_entries * sizeof(*entries), PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);
    uint32_t can = 0;
    if (queue != MAP_FAILED && entries != MAP_FAILED && (parameters.features & IORING_FEAT_SINGLE_MMAP)) {
        make_fail(entries, EIO);
        *(uint32_t *)(queue + parameters.sq_off.array) = 0;
        *(volatile uint32_t *)(queue + parameters.sq_off.tail) = 1;
        if (syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) == 1)
            can = ((struct io_uring_cqe *)(queue + parameters.cq_off.cqes))->res == -EIO;
    }
    close(ring);
    return can;
}

// Stops

// What a thread does between the entry to a call and its exit.
static struct entered {
    pid_t tid;
    int number;
    int dies;
    int restores;
    struct user_regs_struct registers;
    // A vector that was made shorter.
    uint64_t vector;
    uint64_t length;
} entered[64];

static struct entered *entry_of(pid_t tid) {
    for (int i = 0; i < 64; i++)
        if (entered[i].tid == tid) return &entered[i];
    return NULL;
}

static void proceed(pid_t tid, enum __ptrace_request how, int signal) {
    // It may have been killed.
    ptrace(how, tid, 0, (void *)(intptr_t)signal);
}

static void kill_program(void) {
    control->hit = 1;
    kill(control->pid, SIGKILL);
}

// Makes a transfer half as long. Returns whether it could.
static int shorten(pid_t tid, struct user_regs_struct *registers, struct entered *entry) {
    switch (registers->orig_rax) {
    case SYS_read:
    case SYS_write:
    case SYS_pread64:
    case SYS_pwrite64:
    case SYS_getdents64:
        if (registers->rdx < 2) return 0;
        registers->rdx /= 2;
        break;
    case SYS_sendfile:
        if (registers->r10 < 2) return 0;
        registers->r10 /= 2;
        break;
    case SYS_copy_file_range:
    case SYS_splice:
        if (registers->r8 < 2) return 0;
        registers->r8 /= 2;
        break;
    case SYS_readv:
    case SYS_writev:
    case SYS_preadv:
    case SYS_preadv2:
    case SYS_pwritev:
    case SYS_pwritev2: {
        if (registers->rdx > 1) {
            registers->rdx /= 2;
            break;
        }
        uint64_t length;
        if (read_memory(tid, registers->rsi + 8, &length, 8) != 0 || length < 2) return 0;
        uint64_t half = length / 2;
        if (write_memory(tid, registers->rsi + 8, &half, 8) != 0) return 0;
        entry->vector = registers->rsi + 8;
        entry->length = length;
        break;
    }
    default: return 0;
    }
    return ptrace(PTRACE_SETREGS, tid, 0, registers) == 0;
}

// A call of ours begins.
static void at_entry(pid_t tid) {
    struct user_regs_struct registers;
    if (ptrace(PTRACE_GETREGS, tid, 0, &registers) != 0) return proceed(tid, PTRACE_CONT, 0);
    const struct call *call = find((long)registers.orig_rax);
    int is_ring_memory = registers.orig_rax == SYS_mmap && ring_of((int)registers.r8) != NULL;
    int sees_exit = registers.orig_rax == SYS_io_uring_setup || is_ring_memory;
    struct entered entry = {.tid = tid, .number = (int)registers.orig_rax, .registers = registers};
    char key[KEY];
    if (control->without_ring && registers.orig_rax == SYS_io_uring_setup) {
        registers.orig_rax = (unsigned long long)-1;
        registers.rax = (unsigned long long)-EPERM;
        ptrace(PTRACE_SETREGS, tid, 0, &registers);
        return proceed(tid, PTRACE_CONT, 0);
    }
    if (call && !is_ring_memory && key_of(tid, call, &registers, key)) {
        control->calls++;
        int is_it = is_wanted(key);
        if (registers.orig_rax == SYS_io_uring_enter && submit(tid, &registers)) is_it = 1;
        if (is_it) switch (control->mode) {
            case FAIL:
                registers.orig_rax = (unsigned long long)-1;
                registers.rax = (unsigned long long)-control->error;
                control->hit = ptrace(PTRACE_SETREGS, tid, 0, &registers) == 0;
                return proceed(tid, PTRACE_CONT, 0);
            case SHORT:
                if (shorten(tid, &registers, &entry)) control->hit = entry.restores = sees_exit = 1;
                break;
            case KILL_BEFORE: return kill_program();
            case KILL_AFTER: sees_exit = entry.dies = 1; break;
            default: break;
            }
    }
    struct entered *free = sees_exit ? entry_of(0) : NULL;
    if (!free) return proceed(tid, PTRACE_CONT, 0);
    *free = entry;
    proceed(tid, PTRACE_SYSCALL, 0);
}

static void at_exit(pid_t tid) {
    struct entered *entry = entry_of(tid);
    struct user_regs_struct registers;
    if (!entry || ptrace(PTRACE_GETREGS, tid, 0, &registers) != 0) return proceed(tid, PTRACE_CONT, 0);
    long result = (long)registers.rax;
    if (entry->dies) return kill_program();
    if (entry->restores) {
        if (entry->length) write_memory(tid, entry->vector, &entry->length, 8);
        // Programs rely on what these hold after a call.
        registers.rdx = entry->registers.rdx;
        registers.r10 = entry->registers.r10;
        registers.r8 = entry->registers.r8;
        ptrace(PTRACE_SETREGS, tid, 0, &registers);
    } else if (entry->number == SYS_io_uring_setup && result >= 0) {
        struct ring *ring = ring_of((int)result);
        if (!ring && ring_count < 64) ring = &rings[ring_count++];
        if (ring) {
            memset(ring, 0, sizeof(*ring));
            ring->descriptor = (int)result;
            read_memory(tid, entry->registers.rsi, &ring->parameters, sizeof(ring->parameters));
        }
    } else if (entry->number == SYS_mmap && result > 0) {
        struct ring *ring = ring_of((int)entry->registers.r8);
        if (ring && entry->registers.r9 == IORING_OFF_SQ_RING) ring->queue = (uint64_t)result;
        if (ring && entry->registers.r9 == IORING_OFF_SQES) ring->entries = (uint64_t)result;
    }
    memset(entry, 0, sizeof(*entry));
    proceed(tid, PTRACE_CONT, 0);
}

static void trace(void) {
    for (;;) {
        int status;
        pid_t tid = waitpid(-1, &status, __WALL);
        if (tid < 0) {
            if (errno == EINTR) continue;
            return;
        }
        if (!WIFSTOPPED(status)) {
            struct entered *entry = entry_of(tid);
            if (entry) memset(entry, 0, sizeof(*entry));
            if (tid == control->pid) {
                control->status = status;
                control->ended = 1;
                // What it leaves behind ends with the tracer.
                return;
            }
            continue;
        }
        int signal = WSTOPSIG(status), event = status >> 16;
        if (signal == (SIGTRAP | 0x80)) {
            at_exit(tid);
        } else if (event == PTRACE_EVENT_SECCOMP) {
            at_entry(tid);
        } else if (event == PTRACE_EVENT_STOP) {
            int is_group = signal == SIGSTOP || signal == SIGTSTP || signal == SIGTTIN || signal == SIGTTOU;
            proceed(tid, is_group ? PTRACE_LISTEN : PTRACE_CONT, 0);
        } else if (event != 0) {
            proceed(tid, PTRACE_CONT, 0);
        } else {
            proceed(tid, entry_of(tid) ? PTRACE_SYSCALL : PTRACE_CONT, signal);
        }
    }
}

int main(int count, char **arguments) {
    int at = 2;
    for (; at < count && strcmp(arguments[at], "--") != 0; at++) {
        char *equals = strchr(arguments[at], '=');
        if (!equals || folder_count == 16) break;
        *equals = 0;
        folders[folder_count].name = arguments[at];
        folders[folder_count++].path = equals + 1;
    }
    if (at + 1 >= count || strcmp(arguments[at], "--") != 0) {
        fputs("usage: faults CONTROL NAME=FOLDER... -- PROGRAM ARGUMENT...\n", stderr);
        return 64;
    }
    int file = open(arguments[1], O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0 || ftruncate(file, sizeof(*control)) != 0) die(arguments[1]);
    control = mmap(NULL, sizeof(*control), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    seen = mmap(NULL, SLOTS * sizeof(*seen), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (control == MAP_FAILED || seen == MAP_FAILED) die("mmap");
    control->ring = can_inject();

    int gate[2];
    if (pipe2(gate, O_CLOEXEC) != 0) die("pipe");
    pid_t child = fork();
    if (child < 0) die("fork");
    if (child == 0) {
        char byte;
        close(gate[1]);
        // The filter may stop nothing before somebody traces it.
        if (read(gate[0], &byte, 1) != 1) _exit(1);
        filter();
        execv(arguments[at + 1], arguments + at + 1);
        die(arguments[at + 1]);
    }
    long options = PTRACE_O_TRACESECCOMP | PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACECLONE | PTRACE_O_TRACEFORK |
                   PTRACE_O_TRACEVFORK | PTRACE_O_TRACEEXEC | PTRACE_O_EXITKILL;
    if (ptrace(PTRACE_SEIZE, child, 0, options) != 0) die("ptrace");
    control->pid = child;
    if (write(gate[1], "", 1) != 1) die("pipe");
    trace();
    return 0;
}

#endif
