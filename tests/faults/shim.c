/* Disturbs a process at one chosen call that touches a file, or writes down all of them.
 *
 * Preloaded (LD_PRELOAD), it stands between the process and libc, and does nothing until fault_watch() names a root.
 * From then on each call below that root is numbered, and the one that fault_arm() chose is killed, refused or cut
 * short. fsync is counted but not passed on to the kernel: SIGKILL cannot tell, and a power cut is simulated from the
 * trace. Not seen: stores into mapped memory and calls that libc makes to itself; a test that replays the trace
 * and compares the outcome with the real directory would notice.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define NAME_BYTES (PATH_MAX + 512)

enum kind { CHANGES = 1, READS = 2 };
enum action { NOTHING, KILL, KILL_HALFWAY, FAIL, FAIL_FROM_HERE, SHORTEN, PAUSE };

static struct {
    char root[PATH_MAX];
    int log, content;
    long content_bytes;
    long count, chosen;
    int kinds, action, error, who;
} box = {.log = -1, .content = -1};

static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;

#define REAL(type, name, ...)                                                                                          \
    static type (*real)(__VA_ARGS__);                                                                                  \
    if (!real)                                                                                                         \
    real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

/* ---- what the tests call --------------------------------------------------------------------------------------- */

/* Number the calls of these kinds below root from 1 on; write them to trace/calls and trace/content if trace is given,
 * where several processes, each of which is called who, may write. */
EXPORT int fault_watch(const char *root, int kinds, const char *trace, int who) {
    if (!realpath(root, box.root))
        return -1;
    box.count = box.chosen = box.content_bytes = 0;
    box.kinds = kinds;
    box.who = who;
    box.action = NOTHING;
    if (trace) {
        char path[NAME_BYTES];
        snprintf(path, sizeof path, "%s/calls", trace);
        box.log = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
        snprintf(path, sizeof path, "%s/content", trace);
        box.content = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
        if (box.log < 0 || box.content < 0)
            return -1;
    }
    return 0;
}

/* Disturb the chosen-th call from the start of the watch. */
EXPORT void fault_arm(long chosen, int action, int error) {
    pthread_mutex_lock(&one_at_a_time);
    box.chosen = chosen, box.action = action, box.error = error;
    pthread_mutex_unlock(&one_at_a_time);
}

EXPORT long fault_count(void) { return box.count; }

/* A word of the watched process among its calls. */
EXPORT void fault_note(const char *text) {
    pthread_mutex_lock(&one_at_a_time);
    if (box.log >= 0) {
        char line[NAME_BYTES];
        int length = snprintf(line, sizeof line, "%d\t0\tnote\t0\t0\t%s\t\t0\t0\n", box.who, text);
        syscall(SYS_flock, box.log, LOCK_EX);
        syscall(SYS_write, box.log, line, (size_t)length);
        syscall(SYS_flock, box.log, LOCK_UN);
    }
    pthread_mutex_unlock(&one_at_a_time);
}

/* ---- which call is it, and what becomes of it ------------------------------------------------------------------- */

struct call {
    const char *name;
    long number;
    int verdict; /* the action that this call has to suffer */
    char path[NAME_BYTES], other[NAME_BYTES];
};

/* Whether path lies below the root; then it is cut to what follows the root, "." for the root itself. */
static int below_root(char *path) {
    size_t length = strlen(box.root);
    if (!length || strncmp(path, box.root, length) || (path[length] && path[length] != '/'))
        return 0;
    if (!path[length])
        strcpy(path, ".");
    else
        memmove(path, path + length + 1, strlen(path + length));
    return 1;
}

/* The path behind a descriptor; its name in /proc follows renames, so no table of descriptors is needed. */
static int place_of_fd(int fd, char *place) {
    char link[64];
    if (!box.root[0])
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlink, link, place, PATH_MAX);
    if (length < 0)
        return 0;
    place[length] = 0;
    return below_root(place);
}

/* The path that a name means, its last part not followed: the directory is resolved, the name stays. */
static int place_of_name(int directory, const char *name, char *place) {
    char given[NAME_BYTES], folder[PATH_MAX], last[NAME_BYTES];
    if (!box.root[0] || !name || !*name)
        return 0;
    if (name[0] == '/' || directory == AT_FDCWD)
        snprintf(given, sizeof given, "%s", name);
    else
        snprintf(given, sizeof given, "/proc/self/fd/%d/%s", directory, name);
    size_t length = strlen(given);
    while (length > 1 && given[length - 1] == '/')
        given[--length] = 0;
    char *slash = strrchr(given, '/');
    snprintf(last, sizeof last, "%s", slash ? slash + 1 : given);
    if (slash == given)
        slash[1] = 0;
    else if (slash)
        *slash = 0;
    if (!strcmp(last, ".") || !strcmp(last, "..")) {
        snprintf(last, sizeof last, "%s", name);
        if (!realpath(last, place))
            return 0;
        return below_root(place);
    }
    if (!realpath(slash ? given : ".", folder))
        return 0;
    int size = snprintf(place, NAME_BYTES, "%s/%s", strcmp(folder, "/") ? folder : "", last);
    return size < NAME_BYTES && below_root(place);
}

static void die(void) {
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;)
        pause();
}

/* Holds the lock from here to end(), that of all processes with this trace, too: the order in the trace is the order in
 * which things happened. */
static void begin(struct call *call, const char *name, enum kind kind, int takes_space) {
    pthread_mutex_lock(&one_at_a_time);
    call->name = name;
    call->number = 0;
    call->verdict = NOTHING;
    if (!(kind & box.kinds))
        return;
    call->number = ++box.count;
    if (box.action == FAIL_FROM_HERE)
        call->verdict = takes_space && box.chosen && call->number >= box.chosen ? FAIL : NOTHING;
    else if (call->number == box.chosen)
        call->verdict = box.action;
    if (call->verdict == KILL)
        die();
    if (call->verdict == PAUSE) { /* this process stands still, no other one does */
        struct timespec rest = {box.error / 1000, box.error % 1000 * 1000000L};
        nanosleep(&rest, NULL);
    }
    if (box.log >= 0)
        syscall(SYS_flock, box.log, LOCK_EX);
}

static void end(struct call *call, int error, ino_t inode, off_t offset, long length, int fd) {
    if (box.log >= 0 && call->number) {
        char line[3 * NAME_BYTES];
        long copied = 0;
        if (fd >= 0 && !error) { /* what lies in the file now is what the call wrote */
            char link[64], piece[65536];
            snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
            int again = syscall(SYS_openat, AT_FDCWD, link, O_RDONLY | O_CLOEXEC, 0);
            while (again >= 0 && copied < length) {
                long want = length - copied < (long)sizeof piece ? length - copied : (long)sizeof piece;
                long got = syscall(SYS_pread64, again, piece, (size_t)want, offset + copied);
                if (got <= 0 || syscall(SYS_write, box.content, piece, (size_t)got) != got)
                    abort();
                copied += got;
            }
            if (again < 0)
                abort();
            syscall(SYS_close, again);
        }
        int size = snprintf(line, sizeof line, "%d\t%ld\t%s\t%d\t%lu\t%s\t%s\t%ld\t%ld\n", box.who, call->number,
                            call->name, error, (unsigned long)inode, call->path, call->other, (long)offset, length);
        syscall(SYS_write, box.log, line, (size_t)size);
        syscall(SYS_flock, box.log, LOCK_UN);
    }
    pthread_mutex_unlock(&one_at_a_time);
}

static ino_t inode_of_fd(int fd) {
    struct stat status;
    return fstat(fd, &status) ? 0 : status.st_ino;
}

static ino_t inode_of_name(int directory, const char *name) {
    struct stat status;
    return fstatat(directory, name, &status, AT_SYMLINK_NOFOLLOW) ? 0 : status.st_ino;
}

/* One call that returns 0 or -1, and whose object has an inode that is asked for after it. */
#define SIMPLE(call, takes_space, perform, inode)                                                                      \
    do {                                                                                                               \
        begin(&call, call.name, CHANGES, takes_space);                                                                 \
        int result = call.verdict == FAIL ? (errno = box.error, -1) : (int)(perform);                                  \
        int error = result < 0 ? errno : 0;                                                                            \
        end(&call, error, inode, 0, 0, -1);                                                                            \
        errno = error ? error : errno;                                                                                 \
        return result;                                                                                                 \
    } while (0)

/* ---- open and close --------------------------------------------------------------------------------------------- */

static int real_openat(int directory, const char *name, int flags, mode_t mode) {
    return (int)syscall(SYS_openat, directory, name, flags, mode);
}

static int do_open(int directory, const char *name, int flags, mode_t mode) {
    struct call call = {.other = ""};
    if (!place_of_name(directory, name, call.path))
        return real_openat(directory, name, flags, mode);
    struct stat before;
    int existed = fstatat(directory, name, &before, 0) == 0;
    int creates = (flags & O_CREAT) && (!existed || (flags & O_EXCL));
    int empties = existed && !creates && (flags & O_TRUNC) && S_ISREG(before.st_mode);
    if ((flags & O_TMPFILE) == O_TMPFILE)
        begin(&call, "tmpfile", CHANGES, 1);
    else
        begin(&call, creates ? "create" : empties ? "empty" : "open", creates || empties ? CHANGES : READS, creates);
    int fd = call.verdict == FAIL ? (errno = box.error, -1) : real_openat(directory, name, flags, mode);
    int error = fd < 0 ? errno : 0;
    end(&call, error, fd < 0 ? 0 : inode_of_fd(fd), 0, 0, -1);
    if (error)
        errno = error;
    return fd;
}

#define MODE(flags)                                                                                                    \
    mode_t mode = 0;                                                                                                   \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {                                                                           \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode = va_arg(rest, mode_t);                                                                                   \
        va_end(rest);                                                                                                  \
    }

EXPORT int open(const char *name, int flags, ...) { MODE(flags) return do_open(AT_FDCWD, name, flags, mode); }
EXPORT int open64(const char *name, int flags, ...) { MODE(flags) return do_open(AT_FDCWD, name, flags, mode); }
EXPORT int openat(int at, const char *name, int flags, ...) { MODE(flags) return do_open(at, name, flags, mode); }
EXPORT int openat64(int at, const char *name, int flags, ...) { MODE(flags) return do_open(at, name, flags, mode); }
EXPORT int __open_2(const char *name, int flags) { return do_open(AT_FDCWD, name, flags, 0); }
EXPORT int __open64_2(const char *name, int flags) { return do_open(AT_FDCWD, name, flags, 0); }
EXPORT int __openat_2(int at, const char *name, int flags) { return do_open(at, name, flags, 0); }
EXPORT int __openat64_2(int at, const char *name, int flags) { return do_open(at, name, flags, 0); }
EXPORT int creat(const char *name, mode_t mode) {
    return do_open(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode);
}
EXPORT int creat64(const char *name, mode_t mode) {
    return do_open(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

/* std::ofstream opens with fopen, and then writes by itself with write and writev. */
static FILE *do_fopen(const char *name, const char *mode) {
    int flags = mode[0] == 'r' ? 0 : O_CREAT | (mode[0] == 'w' ? O_TRUNC : O_APPEND);
    flags |= strchr(mode, '+') ? O_RDWR : mode[0] == 'r' ? O_RDONLY : O_WRONLY;
    flags |= (strchr(mode, 'x') ? O_EXCL : 0) | (strchr(mode, 'e') ? O_CLOEXEC : 0);
    int fd = do_open(AT_FDCWD, name, flags, 0666);
    return fd < 0 ? NULL : fdopen(fd, mode);
}

EXPORT FILE *fopen(const char *name, const char *mode) { return do_fopen(name, mode); }
EXPORT FILE *fopen64(const char *name, const char *mode) { return do_fopen(name, mode); }

EXPORT DIR *opendir(const char *name) {
    REAL(DIR *, opendir, const char *);
    struct call call = {.other = ""};
    char inside[NAME_BYTES];
    snprintf(inside, sizeof inside, "%s/.", name); /* the directory itself is followed */
    if (!place_of_name(AT_FDCWD, inside, call.path))
        return real(name);
    begin(&call, "list", READS, 0);
    DIR *stream = call.verdict == FAIL ? (errno = box.error, NULL) : real(name);
    int error = stream ? 0 : errno;
    end(&call, error, 0, 0, 0, -1);
    if (error)
        errno = error;
    return stream;
}

static int is_for_reading(int fd) { return (syscall(SYS_fcntl, fd, F_GETFL) & O_ACCMODE) == O_RDONLY; }

EXPORT int close(int fd) {
    struct call call = {.name = "close", .other = ""};
    if (!place_of_fd(fd, call.path) || is_for_reading(fd))
        return (int)syscall(SYS_close, fd);
    begin(&call, "close", CHANGES, 0);
    ino_t inode = inode_of_fd(fd);
    int result = (int)syscall(SYS_close, fd); /* a close that reports an error has closed all the same */
    int error = result < 0 ? errno : 0;
    if (call.verdict == FAIL)
        result = -1, error = box.error;
    end(&call, error, inode, 0, 0, -1);
    if (error)
        errno = error;
    return result;
}

/* Only that reads and writes of an open file pass the page cache by, or no longer, is a call of its own. */
static int do_fcntl(int fd, int command, long argument) {
    struct call call = {.other = ""};
    if (command != F_SETFL || !place_of_fd(fd, call.path))
        return (int)syscall(SYS_fcntl, fd, command, argument);
    begin(&call, argument & O_DIRECT ? "direct" : "cached", is_for_reading(fd) ? READS : CHANGES, 0);
    int result = call.verdict == FAIL ? (errno = box.error, -1) : (int)syscall(SYS_fcntl, fd, command, argument);
    int error = result < 0 ? errno : 0;
    end(&call, error, inode_of_fd(fd), 0, 0, -1);
    if (error)
        errno = error;
    return result;
}

#define ARGUMENT(command)                                                                                              \
    va_list rest;                                                                                                      \
    va_start(rest, command);                                                                                           \
    long argument = va_arg(rest, long);                                                                                \
    va_end(rest)

EXPORT int fcntl(int fd, int command, ...) { ARGUMENT(command); return do_fcntl(fd, command, argument); }
EXPORT int fcntl64(int fd, int command, ...) { ARGUMENT(command); return do_fcntl(fd, command, argument); }

/* ---- bytes ------------------------------------------------------------------------------------------------------ */

static long total(const struct iovec *parts, int count) {
    long sum = 0;
    for (int i = 0; i < count; i++)
        sum += (long)parts[i].iov_len;
    return sum;
}

static ssize_t real_writev(int fd, const struct iovec *parts, int count, off_t offset) {
    if (offset < 0)
        return syscall(SYS_writev, fd, parts, count);
    return syscall(SYS_pwritev, fd, parts, count, offset, 0L);
}

/* The first half of what was asked for, at least one byte. */
static ssize_t write_half(int fd, const struct iovec *parts, int count, off_t offset) {
    long left = (total(parts, count) + 1) / 2;
    struct iovec *first = malloc(sizeof *first * (size_t)count);
    int used = 0;
    for (; used < count && left > 0; used++) {
        first[used] = parts[used];
        if ((long)first[used].iov_len > left)
            first[used].iov_len = (size_t)left;
        left -= (long)first[used].iov_len;
    }
    ssize_t result = real_writev(fd, first, used, offset);
    free(first);
    return result;
}

static ssize_t do_write(int fd, const struct iovec *parts, int count, off_t offset) {
    struct call call = {.other = ""};
    if (!place_of_fd(fd, call.path))
        return real_writev(fd, parts, count, offset);
    begin(&call, "write", CHANGES, 1);
    ssize_t result;
    if (call.verdict == FAIL) {
        result = -1, errno = box.error;
    } else if (call.verdict == KILL_HALFWAY || call.verdict == SHORTEN) {
        result = write_half(fd, parts, count, offset);
        if (call.verdict == KILL_HALFWAY)
            die();
    } else {
        result = real_writev(fd, parts, count, offset);
    }
    int error = result < 0 ? errno : 0;
    off_t start = offset >= 0 ? offset : lseek(fd, 0, SEEK_CUR) - (result < 0 ? 0 : result);
    end(&call, error, inode_of_fd(fd), start, error ? 0 : result, fd);
    if (error)
        errno = error;
    return result;
}

EXPORT ssize_t write(int fd, const void *data, size_t size) {
    struct iovec part = {(void *)data, size};
    char place[NAME_BYTES];
    return place_of_fd(fd, place) ? do_write(fd, &part, 1, -1) : syscall(SYS_write, fd, data, size);
}
EXPORT ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    struct iovec part = {(void *)data, size};
    return do_write(fd, &part, 1, offset);
}
EXPORT ssize_t pwrite64(int fd, const void *data, size_t size, off_t offset) { return pwrite(fd, data, size, offset); }
EXPORT ssize_t writev(int fd, const struct iovec *parts, int count) { return do_write(fd, parts, count, -1); }
EXPORT ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) {
    return do_write(fd, parts, count, offset);
}
EXPORT ssize_t pwritev64(int fd, const struct iovec *parts, int count, off_t offset) {
    return do_write(fd, parts, count, offset);
}
EXPORT ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
    return flags ? (errno = EOPNOTSUPP, -1) : do_write(fd, parts, count, offset);
}
EXPORT ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
    return pwritev2(fd, parts, count, offset, flags);
}

/* Bytes that the kernel moves from one file to another. */
#define MOVES(to, offset_of_target, perform)                                                                           \
    struct call call = {.other = ""};                                                                                  \
    if (!place_of_fd(to, call.path))                                                                                   \
        return perform;                                                                                                \
    begin(&call, "write", CHANGES, 1);                                                                                 \
    if (call.verdict == KILL_HALFWAY || call.verdict == SHORTEN)                                                       \
        size = (size + 1) / 2;                                                                                         \
    ssize_t result = call.verdict == FAIL ? (errno = box.error, -1) : perform;                                         \
    if (call.verdict == KILL_HALFWAY)                                                                                  \
        die();                                                                                                         \
    int error = result < 0 ? errno : 0;                                                                                \
    off_t start = (offset_of_target) - (result < 0 ? 0 : result);                                                      \
    end(&call, error, inode_of_fd(to), start, error ? 0 : result, to);                                                 \
    if (error)                                                                                                         \
        errno = error;                                                                                                 \
    return result

EXPORT ssize_t sendfile(int to, int from, off_t *offset, size_t size) {
    MOVES(to, lseek(to, 0, SEEK_CUR), syscall(SYS_sendfile, to, from, offset, size));
}
EXPORT ssize_t sendfile64(int to, int from, off_t *offset, size_t size) { return sendfile(to, from, offset, size); }
EXPORT ssize_t copy_file_range(int from, off_t *skip, int to, off_t *offset, size_t size, unsigned flags) {
    MOVES(to, offset ? *offset : lseek(to, 0, SEEK_CUR),
          syscall(SYS_copy_file_range, from, skip, to, offset, size, flags));
}

static int do_truncate(struct call *call, int fd, const char *name, off_t size) {
    call->name = "truncate";
    begin(call, "truncate", CHANGES, 0);
    int result = call->verdict == FAIL ? (errno = box.error, -1)
                 : name                ? (int)syscall(SYS_truncate, name, size)
                                       : (int)syscall(SYS_ftruncate, fd, size);
    int error = result < 0 ? errno : 0;
    end(call, error, name ? inode_of_name(AT_FDCWD, name) : inode_of_fd(fd), 0, size, -1);
    if (error)
        errno = error;
    return result;
}

EXPORT int ftruncate(int fd, off_t size) {
    struct call call = {.other = ""};
    return place_of_fd(fd, call.path) ? do_truncate(&call, fd, NULL, size) : (int)syscall(SYS_ftruncate, fd, size);
}
EXPORT int ftruncate64(int fd, off_t size) { return ftruncate(fd, size); }
EXPORT int truncate(const char *name, off_t size) {
    struct call call = {.other = ""};
    return place_of_name(AT_FDCWD, name, call.path) ? do_truncate(&call, -1, name, size)
                                                    : (int)syscall(SYS_truncate, name, size);
}
EXPORT int truncate64(const char *name, off_t size) { return truncate(name, size); }

static int do_fallocate(int fd, int mode, off_t offset, off_t size) {
    struct call call = {.other = ""};
    if (!place_of_fd(fd, call.path))
        return (int)syscall(SYS_fallocate, fd, mode, offset, size);
    begin(&call, mode ? "fallocate-mode" : "fallocate", CHANGES, 1);
    int result = call.verdict == FAIL ? (errno = box.error, -1) : (int)syscall(SYS_fallocate, fd, mode, offset, size);
    int error = result < 0 ? errno : 0;
    end(&call, error, inode_of_fd(fd), offset, size, -1);
    if (error)
        errno = error;
    return result;
}

EXPORT int fallocate(int fd, int mode, off_t at, off_t size) { return do_fallocate(fd, mode, at, size); }
EXPORT int fallocate64(int fd, int mode, off_t at, off_t size) { return do_fallocate(fd, mode, at, size); }
EXPORT int posix_fallocate(int fd, off_t at, off_t size) { return do_fallocate(fd, 0, at, size) ? errno : 0; }
EXPORT int posix_fallocate64(int fd, off_t at, off_t size) { return do_fallocate(fd, 0, at, size) ? errno : 0; }

static int do_fsync(int fd, long number) {
    struct call call = {.name = "fsync", .other = ""};
    if (!place_of_fd(fd, call.path))
        return (int)syscall(number, fd);
    SIMPLE(call, 1, 0, inode_of_fd(fd));
}

EXPORT int fsync(int fd) { return do_fsync(fd, SYS_fsync); }
EXPORT int fdatasync(int fd) { return do_fsync(fd, SYS_fdatasync); }

/* What flushes more than one file is refused: the power cut has no model of it. */
EXPORT int syncfs(int fd) {
    char place[NAME_BYTES];
    return place_of_fd(fd, place) ? (errno = EOPNOTSUPP, -1) : (int)syscall(SYS_syncfs, fd);
}

static ssize_t do_read(int fd, const struct iovec *parts, int count, off_t offset) {
    struct call call = {.other = ""};
    int watched = place_of_fd(fd, call.path);
    if (watched) {
        begin(&call, "read", READS, 0);
        if (call.verdict == FAIL) {
            end(&call, box.error, inode_of_fd(fd), 0, 0, -1);
            errno = box.error;
            return -1;
        }
    }
    struct iovec half = {parts[0].iov_base, (parts[0].iov_len + 1) / 2};
    if (watched && call.verdict == SHORTEN)
        parts = &half, count = 1;
    ssize_t result = offset < 0 ? syscall(SYS_readv, fd, parts, count) : syscall(SYS_preadv, fd, parts, count, offset, 0L);
    int error = result < 0 ? errno : 0;
    if (watched)
        end(&call, error, inode_of_fd(fd), 0, 0, -1);
    if (error)
        errno = error;
    return result;
}

EXPORT ssize_t read(int fd, void *data, size_t size) {
    struct iovec part = {data, size};
    char place[NAME_BYTES];
    return place_of_fd(fd, place) ? do_read(fd, &part, 1, -1) : syscall(SYS_read, fd, data, size);
}
EXPORT ssize_t pread(int fd, void *data, size_t size, off_t offset) {
    struct iovec part = {data, size};
    return do_read(fd, &part, 1, offset);
}
EXPORT ssize_t pread64(int fd, void *data, size_t size, off_t offset) { return pread(fd, data, size, offset); }
EXPORT ssize_t readv(int fd, const struct iovec *parts, int count) { return do_read(fd, parts, count, -1); }
EXPORT ssize_t preadv(int fd, const struct iovec *parts, int count, off_t at) { return do_read(fd, parts, count, at); }
EXPORT ssize_t preadv64(int fd, const struct iovec *parts, int count, off_t at) { return do_read(fd, parts, count, at); }
EXPORT ssize_t preadv2(int fd, const struct iovec *parts, int count, off_t at, int flags) {
    return flags ? (errno = EOPNOTSUPP, -1) : do_read(fd, parts, count, at);
}
EXPORT ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off_t at, int flags) {
    return preadv2(fd, parts, count, at, flags);
}

/* Is it in the page cache? It never is: the truth depends on what else runs, and each run would have other numbers. */
EXPORT int mincore(void *begin, size_t size, unsigned char *is_there) {
    (void)begin;
    memset(is_there, 0, (size + 4095) / 4096);
    return 0;
}

/* ---- names ------------------------------------------------------------------------------------------------------ */

static int do_rename(int from_at, const char *from, int to_at, const char *to, unsigned flags) {
    struct call call = {.name = flags & RENAME_EXCHANGE ? "exchange" : "rename"};
    int leaves = place_of_name(from_at, from, call.path), enters = place_of_name(to_at, to, call.other);
    if (!leaves && !enters)
        return (int)syscall(SYS_renameat2, from_at, from, to_at, to, flags);
    if (!leaves || !enters) /* a file that comes from elsewhere is on another mount, as far as we are concerned */
        return errno = EXDEV, -1;
    SIMPLE(call, 1, syscall(SYS_renameat2, from_at, from, to_at, to, flags), inode_of_name(to_at, to));
}

EXPORT int rename(const char *from, const char *to) { return do_rename(AT_FDCWD, from, AT_FDCWD, to, 0); }
EXPORT int renameat(int from_at, const char *from, int to_at, const char *to) {
    return do_rename(from_at, from, to_at, to, 0);
}
EXPORT int renameat2(int from_at, const char *from, int to_at, const char *to, unsigned flags) {
    return do_rename(from_at, from, to_at, to, flags);
}

static int do_link(int from_at, const char *from, int to_at, const char *to, int flags) {
    struct call call = {.name = "link"};
    if (!place_of_name(to_at, to, call.other))
        return (int)syscall(SYS_linkat, from_at, from, to_at, to, flags);
    if (!place_of_name(from_at, from, call.path))
        strcpy(call.path, "?"); /* a nameless file, given by its descriptor */
    SIMPLE(call, 1, syscall(SYS_linkat, from_at, from, to_at, to, flags), inode_of_name(to_at, to));
}

EXPORT int link(const char *from, const char *to) { return do_link(AT_FDCWD, from, AT_FDCWD, to, 0); }
EXPORT int linkat(int from_at, const char *from, int to_at, const char *to, int flags) {
    return do_link(from_at, from, to_at, to, flags);
}

static int do_symlink(const char *text, int at, const char *name) {
    struct call call = {.name = "symlink"};
    if (!place_of_name(at, name, call.path))
        return (int)syscall(SYS_symlinkat, text, at, name);
    snprintf(call.other, sizeof call.other, "%s", text);
    SIMPLE(call, 1, syscall(SYS_symlinkat, text, at, name), inode_of_name(at, name));
}

EXPORT int symlink(const char *text, const char *name) { return do_symlink(text, AT_FDCWD, name); }
EXPORT int symlinkat(const char *text, int at, const char *name) { return do_symlink(text, at, name); }

static int do_unlink(int at, const char *name, int flags) {
    struct call call = {.name = flags & AT_REMOVEDIR ? "rmdir" : "unlink", .other = ""};
    if (!place_of_name(at, name, call.path))
        return (int)syscall(SYS_unlinkat, at, name, flags);
    SIMPLE(call, 0, syscall(SYS_unlinkat, at, name, flags), 0);
}

EXPORT int unlink(const char *name) { return do_unlink(AT_FDCWD, name, 0); }
EXPORT int unlinkat(int at, const char *name, int flags) { return do_unlink(at, name, flags); }
EXPORT int rmdir(const char *name) { return do_unlink(AT_FDCWD, name, AT_REMOVEDIR); }
EXPORT int remove(const char *name) {
    struct stat status;
    return do_unlink(AT_FDCWD, name, lstat(name, &status) == 0 && S_ISDIR(status.st_mode) ? AT_REMOVEDIR : 0);
}

static int do_mkdir(int at, const char *name, mode_t mode) {
    struct call call = {.name = "mkdir", .other = ""};
    if (!place_of_name(at, name, call.path))
        return (int)syscall(SYS_mkdirat, at, name, mode);
    SIMPLE(call, 1, syscall(SYS_mkdirat, at, name, mode), inode_of_name(at, name));
}

EXPORT int mkdir(const char *name, mode_t mode) { return do_mkdir(AT_FDCWD, name, mode); }
EXPORT int mkdirat(int at, const char *name, mode_t mode) { return do_mkdir(at, name, mode); }
