/* A disk that lies, for LD_PRELOAD; tests/support/lying_disk.py drives it and says what it is for.
 *
 * Everything concerns files below $LYING_DISK_ROOT alone. $LYING_DISK_STATE, on the same file system, holds
 *
 *   control         what to do, and how often it was done: `struct control`, shared by all processes
 *   files/INODE     a file's content as of its last fsync
 *   dirs/INODE      a directory's entries as of its last fsync: lines "INODE TYPE NAME"
 *   graveyard/      what was unlinked, so that no inode number is ever used twice
 *   answers/        what is read in place of /proc/sys/kernel/random/boot_id and /proc/self/mountinfo
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

struct control {
    _Atomic int64_t full, room, readonly;
    _Atomic int64_t full_fired, readonly_fired, synced_files, synced_dirs, answered, asked;
};

static struct control *control;
static char root[PATH_MAX], state[PATH_MAX];
static size_t root_length;

#define REAL(name)                                          \
    ({                                                      \
        static __typeof__(&name) real;                      \
        if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name); \
        real;                                               \
    })
#define ROOM(n) (n), sizeof(n)

__attribute__((constructor)) static void begin(void) {
    const char *r = getenv("LYING_DISK_ROOT"), *s = getenv("LYING_DISK_STATE");
    char path[PATH_MAX + 16];
    if (!r || !s) return;
    snprintf(ROOM(root), "%s", r);
    snprintf(ROOM(state), "%s", s);
    root_length = strlen(root);
    snprintf(ROOM(path), "%s/control", state);
    int fd = REAL(open)(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) abort();
    control = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (control == MAP_FAILED) abort();
    close(fd);
}

/* --- Which files */

static int below(const char *path) {
    return control && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static int path_of_fd(int fd, char *out, size_t size) {
    char link[64];
    snprintf(ROOM(link), "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, out, size - 1);
    if (n < 0) return 0;
    out[n] = 0;
    return 1;
}

static int fd_below(int fd) {
    char path[PATH_MAX];
    int before = errno, is = control && path_of_fd(fd, ROOM(path)) && below(path);
    errno = before;
    return is;
}

/* The absolute path, if it is below the root. */
static int ours(int dir, const char *path, char *out, size_t size) {
    char base[PATH_MAX];
    int before = errno, known = 1;
    if (!control || !path) return 0;
    if (path[0] == '/') {
        snprintf(out, size, "%s", path);
    } else {
        known = dir == AT_FDCWD ? getcwd(ROOM(base)) != NULL : path_of_fd(dir, ROOM(base));
        if (known) snprintf(out, size, "%s/%s", base, path);
    }
    errno = before;
    return known && below(out);
}

/* --- Full and read-only */

static int refuse(_Atomic int64_t *fired, int error) {
    (*fired)++;
    errno = error;
    return -1;
}

static int readonly_path(int dir, const char *path) {
    char full[PATH_MAX];
    if (!control || !control->readonly || !ours(dir, path, ROOM(full))) return 0;
    return refuse(&control->readonly_fired, EROFS);
}

/* Bytes of [at, at + n) of a file for which there is room, which is taken; -1 and an errno if for none. */
static int64_t admitted(int fd, int64_t at, int64_t n) {
    struct stat st;
    if (!control || (!control->full && !control->readonly) || !n || !fd_below(fd)) return n;
    if (control->readonly) return refuse(&control->readonly_fired, EROFS);
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) return n;
    /* What is allocated is written over without asking; a file with holes counts as having nothing. */
    if (at >= 0 && at + n <= st.st_size && st.st_blocks * 512 >= st.st_size) return n;
    int64_t room = control->room, taken;
    do {
        taken = n < room ? n : room;
        if (taken <= 0) return refuse(&control->full_fired, ENOSPC);
    } while (!atomic_compare_exchange_weak(&control->room, &room, room - taken));
    if (taken < n) control->full_fired++;
    return taken;
}

static int64_t position(int fd) {
    int before = errno, flags = fcntl(fd, F_GETFL);
    int64_t at = flags >= 0 && flags & O_APPEND ? -1 : lseek(fd, 0, SEEK_CUR);
    errno = before;
    return at;
}

ssize_t write(int fd, const void *data, size_t n) {
    int64_t may = control && (control->full || control->readonly) ? admitted(fd, position(fd), n) : (int64_t)n;
    return may < 0 ? -1 : REAL(write)(fd, data, may);
}

ssize_t pwrite(int fd, const void *data, size_t n, off_t at) {
    int64_t may = admitted(fd, at, n);
    return may < 0 ? -1 : REAL(pwrite)(fd, data, may, at);
}
ssize_t pwrite64(int fd, const void *data, size_t n, off_t at) { return pwrite(fd, data, n, at); }

/* Of several buffers the first for which there is room. */
ssize_t pwritev(int fd, const struct iovec *v, int count, off_t at) {
    return control && control->full && count ? pwrite(fd, v[0].iov_base, v[0].iov_len, at)
         : admitted(fd, at, 1) < 0           ? -1
                                             : REAL(pwritev)(fd, v, count, at);
}
ssize_t pwritev64(int fd, const struct iovec *v, int count, off_t at) { return pwritev(fd, v, count, at); }

ssize_t writev(int fd, const struct iovec *v, int count) {
    return control && (control->full || control->readonly) && count && fd_below(fd)
               ? write(fd, v[0].iov_base, v[0].iov_len)
               : REAL(writev)(fd, v, count);
}

ssize_t sendfile(int out, int in, off_t *from, size_t n) {
    int64_t may = control && (control->full || control->readonly) ? admitted(out, -1, n) : (int64_t)n;
    return may < 0 ? -1 : REAL(sendfile)(out, in, from, may);
}
ssize_t sendfile64(int out, int in, off_t *from, size_t n) { return sendfile(out, in, from, n); }

ssize_t copy_file_range(int in, off_t *from, int out, off_t *to, size_t n, unsigned flags) {
    int64_t may = admitted(out, -1, n);
    return may < 0 ? -1 : REAL(copy_file_range)(in, from, out, to, may, flags);
}

/* All or nothing: the error, or 0. */
static int cannot_allocate(int fd, off_t at, off_t n) {
    struct stat st;
    if (!control || (!control->full && !control->readonly) || !fd_below(fd)) return 0;
    if (control->readonly) return refuse(&control->readonly_fired, EROFS), EROFS;
    if (fstat(fd, &st)) return 0;
    int64_t more = at + n - st.st_blocks * 512;
    if (more <= 0) return 0;
    int64_t room = control->room;
    do {
        if (more > room) return refuse(&control->full_fired, ENOSPC), ENOSPC;
    } while (!atomic_compare_exchange_weak(&control->room, &room, room - more));
    return 0;
}

int posix_fallocate(int fd, off_t at, off_t n) {
    int error = cannot_allocate(fd, at, n);
    return error ? error : REAL(posix_fallocate)(fd, at, n);
}
int posix_fallocate64(int fd, off_t at, off_t n) { return posix_fallocate(fd, at, n); }

int fallocate(int fd, int mode, off_t at, off_t n) {
    errno = cannot_allocate(fd, at, n);
    return errno ? -1 : REAL(fallocate)(fd, mode, at, n);
}
int fallocate64(int fd, int mode, off_t at, off_t n) { return fallocate(fd, mode, at, n); }

int ftruncate(int fd, off_t size) {
    if (control && control->readonly && fd_below(fd)) return refuse(&control->readonly_fired, EROFS);
    return REAL(ftruncate)(fd, size);
}
int ftruncate64(int fd, off_t size) { return ftruncate(fd, size); }

int truncate(const char *path, off_t size) {
    return readonly_path(AT_FDCWD, path) ? -1 : REAL(truncate)(path, size);
}
int truncate64(const char *path, off_t size) { return truncate(path, size); }

static void shrink(struct statvfs *out) {
    if (!control->full) return;
    control->asked++;
    out->f_bavail = out->f_bfree = control->room / out->f_frsize;
}

int statvfs(const char *path, struct statvfs *out) {
    char full[PATH_MAX];
    int done = REAL(statvfs)(path, out);
    if (!done && ours(AT_FDCWD, path, ROOM(full))) shrink(out);
    return done;
}
int statvfs64(const char *path, struct statvfs64 *out) { return statvfs(path, (struct statvfs *)out); }

int fstatvfs(int fd, struct statvfs *out) {
    int done = REAL(fstatvfs)(fd, out);
    if (!done && fd_below(fd)) shrink(out);
    return done;
}
int fstatvfs64(int fd, struct statvfs64 *out) { return fstatvfs(fd, (struct statvfs *)out); }

/* --- Opening */

static int opened(int dir, const char *path, int flags, mode_t mode) {
    char full[PATH_MAX + 16];
    if (control && (!strcmp(path, "/proc/sys/kernel/random/boot_id") || !strcmp(path, "/proc/self/mountinfo"))) {
        snprintf(ROOM(full), "%s/answers/%s", state, strrchr(path, '/') + 1);
        int fd = REAL(open)(full, flags);
        if (fd >= 0) control->answered++;
        if (fd >= 0 || errno != ENOENT) return fd;
    }
    int changes = flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC);
    if (changes && control && (control->readonly || control->full) && ours(dir, path, ROOM(full))) {
        int missing = faccessat(AT_FDCWD, full, F_OK, 0) != 0;
        if (control->readonly && (missing || changes & ~O_CREAT)) return refuse(&control->readonly_fired, EROFS);
        if (control->full && control->room <= 0 && missing && flags & O_CREAT)
            return refuse(&control->full_fired, ENOSPC);
    }
    return REAL(openat)(dir, path, flags, mode);
}

#define MODE(flags)                                       \
    mode_t mode = 0;                                      \
    if ((flags) & (O_CREAT | (O_TMPFILE & ~O_DIRECTORY))) { \
        va_list rest;                                     \
        va_start(rest, flags);                            \
        mode = va_arg(rest, mode_t);                      \
        va_end(rest);                                     \
    }

int open(const char *path, int flags, ...) { MODE(flags) return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return opened(AT_FDCWD, path, flags, mode); }
int openat(int dir, const char *path, int flags, ...) { MODE(flags) return opened(dir, path, flags, mode); }
int openat64(int dir, const char *path, int flags, ...) { MODE(flags) return opened(dir, path, flags, mode); }
int creat(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

/* --- What is durable */

static void record(const char *kind, ino_t inode, int (*fill)(int to, int from), int from) {
    static _Atomic int number;
    char fresh[PATH_MAX + 128], final[PATH_MAX + 64];
    snprintf(ROOM(final), "%s/%s/%lu", state, kind, (unsigned long)inode);
    snprintf(ROOM(fresh), "%s.%d.%d", final, getpid(), number++);
    int to = REAL(open)(fresh, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (to < 0 || fill(to, from) || close(to) || REAL(rename)(fresh, final)) {
        perror("lying disk");
        abort();
    }
}

static int copy(int to, int from) {
    static _Thread_local char buffer[1 << 16];
    /* Reopened: it may be open for writing alone. */
    char path[64];
    snprintf(ROOM(path), "/proc/self/fd/%d", from);
    int in = REAL(open)(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = -1;
    while (in >= 0 && (n = read(in, buffer, sizeof buffer)) > 0)
        if (REAL(write)(to, buffer, n) != n) return -1;
    if (in >= 0) close(in);
    return n ? -1 : 0;
}

static int list(int to, int from) {
    char path[64];
    snprintf(ROOM(path), "/proc/self/fd/%d", from);
    DIR *dir = opendir(path);
    struct dirent *e;
    if (!dir) return -1;
    while ((e = readdir(dir)))
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, ".."))
            dprintf(to, "%lu %c %s\n", (unsigned long)e->d_ino, e->d_type == DT_DIR ? 'd' : e->d_type == DT_REG ? 'f' : '?', e->d_name);
    return closedir(dir);
}

static int synced(int fd) {
    struct stat st;
    if (fstat(fd, &st)) return -1;
    if (S_ISDIR(st.st_mode)) {
        record("dirs", st.st_ino, list, fd);
        control->synced_dirs++;
    } else {
        record("files", st.st_ino, copy, fd);
        control->synced_files++;
    }
    return 0;
}

/* The disk below is left alone: it outlives the test, and waiting for it takes time. */
int fsync(int fd) { return fd_below(fd) ? synced(fd) : REAL(fsync)(fd); }
int fdatasync(int fd) { return fd_below(fd) ? synced(fd) : REAL(fdatasync)(fd); }

/* --- What goes */

static void bury_file(const char *path) {
    struct stat st;
    char grave[PATH_MAX + 64];
    int before = errno;
    if (!lstat(path, &st) && S_ISREG(st.st_mode) && st.st_nlink == 1) {
        snprintf(ROOM(grave), "%s/graveyard/%lu", state, (unsigned long)st.st_ino);
        if (REAL(link)(path, grave) && errno != EEXIST && errno != ENOENT) abort();
    }
    errno = before;
}

static int bury_directory(const char *path) {
    struct stat st;
    struct dirent *e;
    char grave[PATH_MAX + 64];
    int entries = 0;
    DIR *dir = opendir(path);
    if (!dir) return -1;
    while ((e = readdir(dir))) entries++;
    closedir(dir);
    if (entries > 2) {
        errno = ENOTEMPTY;
        return -1;
    }
    if (lstat(path, &st)) return -1;
    snprintf(ROOM(grave), "%s/graveyard/%lu", state, (unsigned long)st.st_ino);
    return REAL(rename)(path, grave);
}

int unlinkat(int dir, const char *path, int flags) {
    char full[PATH_MAX];
    if (readonly_path(dir, path)) return -1;
    if (ours(dir, path, ROOM(full))) {
        if (flags & AT_REMOVEDIR) return bury_directory(full);
        bury_file(full);
    }
    return REAL(unlinkat)(dir, path, flags);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int renameat2(int from_dir, const char *from, int to_dir, const char *to, unsigned flags) {
    char full[PATH_MAX];
    if (readonly_path(from_dir, from) || readonly_path(to_dir, to)) return -1;
    if (!flags && ours(to_dir, to, ROOM(full))) bury_file(full);
    return REAL(renameat2)(from_dir, from, to_dir, to, flags);
}
int renameat(int from_dir, const char *from, int to_dir, const char *to) {
    return renameat2(from_dir, from, to_dir, to, 0);
}
int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }

int mkdirat(int dir, const char *path, mode_t mode) {
    char full[PATH_MAX];
    if (readonly_path(dir, path)) return -1;
    if (control && control->full && control->room <= 0 && ours(dir, path, ROOM(full)))
        return refuse(&control->full_fired, ENOSPC);
    return REAL(mkdirat)(dir, path, mode);
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int linkat(int from_dir, const char *from, int to_dir, const char *to, int flags) {
    return readonly_path(to_dir, to) ? -1 : REAL(linkat)(from_dir, from, to_dir, to, flags);
}
int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

int utimensat(int dir, const char *path, const struct timespec times[2], int flags) {
    return readonly_path(dir, path) ? -1 : REAL(utimensat)(dir, path, times, flags);
}
