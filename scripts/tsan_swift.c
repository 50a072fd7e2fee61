// Preloaded into programs under ThreadSanitizer: tells it of the synchronisation inside Swift's runtime, whose
// libraries are not instrumented. Without it every value that a task awaits from another thread is a report.
//
// Compile it with Swift's clang (swiftcall).

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>

extern void __tsan_acquire(void *address) __attribute__((weak));
extern void __tsan_release(void *address) __attribute__((weak));

// The runtime tells ThreadSanitizer of tasks by itself once its hook was called, which on Linux nobody does.
__attribute__((constructor)) static void enable(void) {
    void (*hook)(void) = (void (*)(void))dlsym(RTLD_DEFAULT, "__tsan_on_initialize");
    // Swift's own tools run with this preloaded as well, and have no sanitizer.
    if (hook && __tsan_acquire) hook();
}

// Synchronization.Mutex: without contention its code is in the program and seen; with contention it is in these two.
#define LOCK_SLOW "$s15Synchronization12_MutexHandleV9_lockSlowyys6UInt32VF"
#define UNLOCK_SLOW "$s15Synchronization12_MutexHandleV11_unlockSlowyyF"

typedef __attribute__((swiftcall)) void (*LockSlow)(uint32_t thread, __attribute__((swift_context)) void *mutex);
typedef __attribute__((swiftcall)) void (*UnlockSlow)(__attribute__((swift_context)) void *mutex);

__attribute__((swiftcall)) void lockSlow(uint32_t thread, __attribute__((swift_context)) void *mutex) __asm__(LOCK_SLOW);
__attribute__((swiftcall)) void lockSlow(uint32_t thread, __attribute__((swift_context)) void *mutex) {
    static LockSlow next;
    if (!next) next = (LockSlow)dlsym(RTLD_NEXT, LOCK_SLOW);
    next(thread, mutex);
    if (__tsan_acquire) __tsan_acquire(mutex);
}

__attribute__((swiftcall)) void unlockSlow(__attribute__((swift_context)) void *mutex) __asm__(UNLOCK_SLOW);
__attribute__((swiftcall)) void unlockSlow(__attribute__((swift_context)) void *mutex) {
    static UnlockSlow next;
    if (!next) next = (UnlockSlow)dlsym(RTLD_NEXT, UNLOCK_SLOW);
    if (__tsan_release) __tsan_release(mutex);
    next(mutex);
}
