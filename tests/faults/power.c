/* Preloaded into a server (LD_PRELOAD): records what it does to files, and makes a chosen sync fail.

   POWER_ROOT  only paths below it count; -shm files, which SQLite makes anew, do not
   POWER_LOG   every change and every sync is appended here in the order in which it took effect; see power.py
   POWER_FAIL  a control file, `PATTERN N`: once it is there, the N-th sync of a path that matches fails with EIO, once,
               and as on a real system nobody hears of it again */
#define _GNU_SOURCE
#undef _FILE_OFFSET_BITS
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define FILES 4096
#define REAL(name) (*(__typeof__(&name))dlsym(RTLD_NEXT, #name))

struct record { /* then the path, then the data */
  uint32_t op, path_length;
  uint64_t inode, offset, size, data_length;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *paths[FILES]; /* of the open files that count, by descriptor */
static const char *root, *control;
static int log_fd = -1, matched;

__attribute__((constructor)) static void begin(void) {
  const char *log = getenv("POWER_LOG");
  root = getenv("POWER_ROOT");
  control = getenv("POWER_FAIL");
  if (log) log_fd = REAL(open)(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static int counts(const char *path) {
  size_t length = root ? strlen(root) : 0, end = strlen(path);
  if (!length || strncmp(path, root, length) || (path[length] != '/' && path[length])) return 0;
  return end < 4 || strcmp(path + end - 4, "-shm");
}

static void put(char op, const char *path, uint64_t inode, uint64_t offset, uint64_t size, const void *data,
                size_t length) {
  struct record head = {(uint32_t)op, (uint32_t)strlen(path), inode, offset, size, length};
  struct iovec parts[3] = {{&head, sizeof head}, {(void *)path, strlen(path)}, {(void *)data, length}};
  if (log_fd >= 0 && writev(log_fd, parts, 3) < 0) abort();
}

static uint64_t inode_of(int fd) {
  struct stat found;
  return fstat(fd, &found) ? 0 : found.st_ino;
}

static char sync_of(int fd) {
  struct stat found;
  return !fstat(fd, &found) && S_ISDIR(found.st_mode) ? 'D' : 'S';
}

static int known(int fd) { return fd >= 0 && fd < FILES && paths[fd]; }

static int opened(int fd, const char *path, int flags, int was_there) {
  if (fd < 0 || fd >= FILES) return fd;
  paths[fd] = strdup(path);
  if (!was_there) put('C', path, inode_of(fd), 0, 0, "", 0);
  if (was_there && (flags & O_TRUNC)) put('T', path, inode_of(fd), 0, 0, "", 0);
  return fd;
}

#define OPEN(name, real)                                              \
  int name(const char *path, int flags, ...) {                        \
    va_list rest;                                                     \
    va_start(rest, flags);                                            \
    mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                                                     \
    if (!counts(path)) return REAL(real)(path, flags, mode);          \
    pthread_mutex_lock(&lock);                                        \
    int was_there = !access(path, F_OK);                              \
    int fd = opened(REAL(real)(path, flags, mode), path, flags, was_there); \
    int error = errno;                                                \
    pthread_mutex_unlock(&lock);                                      \
    errno = error;                                                    \
    return fd;                                                        \
  }
OPEN(open, open)
OPEN(open64, open64)

int close(int fd) {
  pthread_mutex_lock(&lock);
  if (known(fd)) {
    free(paths[fd]);
    paths[fd] = NULL;
  }
  pthread_mutex_unlock(&lock);
  return REAL(close)(fd);
}

static ssize_t wrote(int fd, const void *data, ssize_t size, off64_t offset) {
  if (size > 0 && known(fd)) put('W', paths[fd], inode_of(fd), (uint64_t)offset, 0, data, (size_t)size);
  return size;
}

ssize_t write(int fd, const void *data, size_t size) {
  if (!known(fd)) return REAL(write)(fd, data, size);
  pthread_mutex_lock(&lock);
  ssize_t done = REAL(write)(fd, data, size);
  int error = errno;
  wrote(fd, data, done, done > 0 ? lseek64(fd, 0, SEEK_CUR) - done : 0);
  pthread_mutex_unlock(&lock);
  errno = error;
  return done;
}

#define PWRITE(name, type)                                            \
  ssize_t name(int fd, const void *data, size_t size, type offset) {  \
    if (!known(fd)) return REAL(name)(fd, data, size, offset);        \
    pthread_mutex_lock(&lock);                                        \
    ssize_t done = REAL(name)(fd, data, size, offset);                \
    int error = errno;                                                \
    wrote(fd, data, done, offset);                                    \
    pthread_mutex_unlock(&lock);                                      \
    errno = error;                                                    \
    return done;                                                      \
  }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define TRUNCATE(name, type)                                          \
  int name(int fd, type size) {                                       \
    if (!known(fd)) return REAL(name)(fd, size);                      \
    pthread_mutex_lock(&lock);                                        \
    int result = REAL(name)(fd, size);                                \
    int error = errno;                                                \
    if (!result) put('T', paths[fd], inode_of(fd), 0, (uint64_t)size, "", 0); \
    pthread_mutex_unlock(&lock);                                      \
    errno = error;                                                    \
    return result;                                                    \
  }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

static int fails(const char *path) {
  char pattern[PATH_MAX] = "";
  int wanted = 0;
  FILE *file = control ? fopen(control, "r") : NULL;
  if (!file) return 0;
  int read = fscanf(file, "%4000s %d", pattern, &wanted);
  fclose(file);
  return read == 2 && !fnmatch(pattern, path, 0) && ++matched == wanted;
}

#define SYNC(name)                                                    \
  int name(int fd) {                                                  \
    if (!known(fd)) return REAL(name)(fd);                            \
    pthread_mutex_lock(&lock);                                        \
    int result = -1, error = EIO;                                     \
    if (!fails(paths[fd])) {                                          \
      result = REAL(name)(fd);                                        \
      error = errno;                                                  \
      if (!result) put(sync_of(fd), paths[fd], inode_of(fd), 0, 0, "", 0);    \
    }                                                                 \
    pthread_mutex_unlock(&lock);                                      \
    errno = error;                                                    \
    return result;                                                    \
  }
SYNC(fsync)
SYNC(fdatasync)

int rename(const char *from, const char *to) {
  pthread_mutex_lock(&lock);
  int result = REAL(rename)(from, to), error = errno;
  if (!result && counts(from)) put('R', from, 0, 0, 0, to, strlen(to));
  pthread_mutex_unlock(&lock);
  errno = error;
  return result;
}

int unlink(const char *path) {
  pthread_mutex_lock(&lock);
  int result = REAL(unlink)(path), error = errno;
  if (!result && counts(path)) put('U', path, 0, 0, 0, "", 0);
  pthread_mutex_unlock(&lock);
  errno = error;
  return result;
}

int mkdir(const char *path, mode_t mode) {
  pthread_mutex_lock(&lock);
  int result = REAL(mkdir)(path, mode), error = errno;
  if (!result && counts(path)) put('M', path, 0, 0, 0, "", 0);
  pthread_mutex_unlock(&lock);
  errno = error;
  return result;
}
