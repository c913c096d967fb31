/* Calls of the C library that fail on purpose, for `LD_PRELOAD`: the n-th call of one kind, or of
   any, on a path under a directory, fails with an error, or does less than it was asked for, or
   kills the process. Armed by a call of `arm`, from the process itself.

   Every call on a path under the directory is counted. What fired is written to the report, as
   "CALL PATH\n"; the number of calls that were counted is `calls()`. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { SHORT = -1, KILL = -2, NOTHING = -3 }; /* what is asked for in the place of an errno */

static char wanted_call[32], under[PATH_MAX], report[PATH_MAX];
static int number, failure, ever, armed;
static atomic_int counted;

void arm(const char *call, const char *folder, int n, int error, int and_ever_after,
         const char *report_to) {
    strncpy(wanted_call, call, sizeof wanted_call - 1);
    strncpy(under, folder, sizeof under - 1);
    strncpy(report, report_to, sizeof report - 1);
    number = n, failure = error, ever = and_ever_after;
    atomic_store(&counted, 0);
    armed = 1;
}

static int is_under(const char *path) {
    size_t length = strlen(under);
    return strncmp(path, under, length) == 0 && (path[length] == '/' || path[length] == 0);
}

static void path_of_fd(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long got = syscall(SYS_readlink, link, path, PATH_MAX - 1);
    path[got > 0 ? got : 0] = 0;
}

static void absolute(int folder, const char *given, char *path) {
    path[0] = 0;
    if (given[0] != '/') {
        if (folder == AT_FDCWD) {
            if (syscall(SYS_getcwd, path, PATH_MAX) < 0) path[0] = 0;
        } else {
            path_of_fd(folder, path);
        }
        strncat(path, "/", PATH_MAX - strlen(path) - 1);
    }
    strncat(path, given, PATH_MAX - strlen(path) - 1);
}

/* What is to happen at this call: 0 for what it does anyway, else an errno, SHORT or NOTHING. */
static int fate(const char *call, const char *path) {
    if (!armed || !is_under(path)) return 0;
    if (strcmp(wanted_call, "any") != 0 && strcmp(wanted_call, call) != 0) return 0;
    int at = atomic_fetch_add(&counted, 1) + 1;
    if (at != number && !(ever && at > number)) return 0;
    if (at == number) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%s %s\n", call, path);
        int fd = syscall(SYS_openat, AT_FDCWD, report, O_WRONLY | O_CREAT | O_APPEND, 0666);
        syscall(SYS_write, fd, line, length);
        syscall(SYS_close, fd);
    }
    if (failure == KILL) syscall(SYS_kill, getpid(), SIGKILL);
    return failure;
}

static int fate_at(const char *call, int folder, const char *given) {
    if (!armed) return 0;
    int kept = errno;
    char path[PATH_MAX];
    absolute(folder, given, path);
    errno = kept;
    return fate(call, path);
}

static int fate_of(const char *call, int fd) {
    if (!armed) return 0;
    int kept = errno;
    char path[PATH_MAX];
    path_of_fd(fd, path);
    errno = kept;
    return fate(call, path);
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAIL(fated, value) \
    do { int f_ = (fated); if (f_ > 0) { errno = f_; return (value); } } while (0)
#define LESS(count) (fated == SHORT && (count) > 1 ? (count) / 2 : (count))

static mode_t mode_of(int flags, va_list rest) {
    return flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; va_start(rest, flags); \
        mode_t mode = mode_of(flags, rest); va_end(rest); \
        FAIL(fate_at(flags & O_CREAT ? "create" : "open", AT_FDCWD, path), -1); \
        return real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; va_start(rest, flags); \
        mode_t mode = mode_of(flags, rest); va_end(rest); \
        FAIL(fate_at(flags & O_CREAT ? "create" : "open", folder, path), -1); \
        return real(folder, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t read(int fd, void *buffer, size_t count) {
    REAL(read);
    int fated = fate_of("read", fd);
    FAIL(fated, -1);
    return real(fd, buffer, LESS(count));
}

ssize_t write(int fd, const void *buffer, size_t count) {
    REAL(write);
    int fated = fate_of("write", fd);
    FAIL(fated, -1);
    return real(fd, buffer, LESS(count));
}

ssize_t pread64(int fd, void *buffer, size_t count, off64_t offset) {
    REAL(pread64);
    int fated = fate_of("pread", fd);
    FAIL(fated, -1);
    return real(fd, buffer, LESS(count), offset);
}

ssize_t pwrite64(int fd, const void *buffer, size_t count, off64_t offset) {
    REAL(pwrite64);
    int fated = fate_of("pwrite", fd);
    FAIL(fated, -1);
    return real(fd, buffer, LESS(count), offset);
}

static ssize_t one_part(int fated, ssize_t (*whole)(int, const struct iovec *, int, off64_t, int),
                        int fd, const struct iovec *parts, int count, off64_t offset, int flags) {
    if (fated == SHORT && count == 1 && parts[0].iov_len > 1) {
        struct iovec half = {parts[0].iov_base, parts[0].iov_len / 2};
        return whole(fd, &half, 1, offset, flags);
    }
    return whole(fd, parts, count, offset, flags);
}

ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags) {
    REAL(preadv64v2);
    int fated = fate_of("pread", fd);
    FAIL(fated, -1);
    return one_part(fated, real, fd, parts, count, offset, flags);
}

ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags) {
    REAL(pwritev64v2);
    int fated = fate_of("pwrite", fd);
    FAIL(fated, -1);
    return one_part(fated, real, fd, parts, count, offset, flags);
}

static ssize_t one_part_v1(int fated, ssize_t (*whole)(int, const struct iovec *, int, off64_t),
                           int fd, const struct iovec *parts, int count, off64_t offset) {
    if (fated == SHORT && count == 1 && parts[0].iov_len > 1) {
        struct iovec half = {parts[0].iov_base, parts[0].iov_len / 2};
        return whole(fd, &half, 1, offset);
    }
    return whole(fd, parts, count, offset);
}

ssize_t preadv64(int fd, const struct iovec *parts, int count, off64_t offset) {
    REAL(preadv64);
    int fated = fate_of("pread", fd);
    FAIL(fated, -1);
    return one_part_v1(fated, real, fd, parts, count, offset);
}

ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t offset) {
    REAL(pwritev64);
    int fated = fate_of("pwrite", fd);
    FAIL(fated, -1);
    return one_part_v1(fated, real, fd, parts, count, offset);
}

/* Counted for the file that is written, and for the one that is read as another kind of call. */
ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *into, size_t count, unsigned flags) {
    REAL(copy_file_range);
    int fated = fate_of("copy_from", from);
    FAIL(fated, -1);
    if (!fated) fated = fate_of("copy_file_range", to);
    FAIL(fated, -1);
    return real(from, at, to, into, LESS(count), flags);
}

int ftruncate64(int fd, off64_t length) {
    REAL(ftruncate64);
    FAIL(fate_of("ftruncate", fd), -1);
    return real(fd, length);
}

/* NOTHING: the disk says that it has synced, and hasn't. */
int fsync(int fd) {
    REAL(fsync);
    int fated = fate_of("fsync", fd);
    FAIL(fated, -1);
    return fated == NOTHING ? 0 : real(fd);
}

int fdatasync(int fd) {
    REAL(fdatasync);
    int fated = fate_of("fsync", fd);
    FAIL(fated, -1);
    return fated == NOTHING ? 0 : real(fd);
}

int sync_file_range(int fd, off64_t offset, off64_t length, unsigned flags) {
    REAL(sync_file_range);
    int fated = fate_of("sync_file_range", fd);
    FAIL(fated, -1);
    return fated == NOTHING ? 0 : real(fd, offset, length, flags);
}

/* The file is closed all the same, as Linux does. */
int close(int fd) {
    REAL(close);
    int fated = fate_of("close", fd);
    int done = real(fd);
    FAIL(fated, -1);
    return done;
}

int rename(const char *from, const char *to) {
    REAL(rename);
    FAIL(fate_at("rename", AT_FDCWD, from), -1);
    return real(from, to);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    REAL(renameat);
    FAIL(fate_at("rename", from_folder, from), -1);
    return real(from_folder, from, to_folder, to);
}

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    REAL(renameat2);
    FAIL(fate_at("rename", from_folder, from), -1);
    return real(from_folder, from, to_folder, to, flags);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    FAIL(fate_at("mkdir", AT_FDCWD, path), -1);
    return real(path, mode);
}

int unlink(const char *path) {
    REAL(unlink);
    FAIL(fate_at("unlink", AT_FDCWD, path), -1);
    return real(path);
}

int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat);
    FAIL(fate_at(flags & AT_REMOVEDIR ? "rmdir" : "unlink", folder, path), -1);
    return real(folder, path, flags);
}

int rmdir(const char *path) {
    REAL(rmdir);
    FAIL(fate_at("rmdir", AT_FDCWD, path), -1);
    return real(path);
}

#define STAT(name) \
    int name(const char *path, struct stat64 *found) { \
        REAL(name); \
        FAIL(fate_at("stat", AT_FDCWD, path), -1); \
        return real(path, found); \
    }
STAT(stat64)
STAT(lstat64)

int fstat64(int fd, struct stat64 *found) {
    REAL(fstat64);
    FAIL(fate_of("fstat", fd), -1);
    return real(fd, found);
}

int fstatat64(int folder, const char *path, struct stat64 *found, int flags) {
    REAL(fstatat64);
    FAIL(fate_at("stat", folder, path), -1);
    return real(folder, path, found, flags);
}

#include <dirent.h>

DIR *opendir(const char *path) {
    REAL(opendir);
    FAIL(fate_at("opendir", AT_FDCWD, path), NULL);
    return real(path);
}

DIR *fdopendir(int fd) {
    REAL(fdopendir);
    FAIL(fate_of("opendir", fd), NULL);
    return real(fd);
}

#include <sys/file.h>

int flock(int fd, int how) {
    REAL(flock);
    FAIL(fate_of("flock", fd), -1);
    return real(fd, how);
}
