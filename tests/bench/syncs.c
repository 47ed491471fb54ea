/* Counts fsync and fdatasync of a server, over all its processes: LD_PRELOAD this, BENCH_SYNCS names a file of 8 bytes. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

static _Atomic long unmapped;
static _Atomic long *count = &unmapped;
static int (*real_fsync)(int), (*real_fdatasync)(int);

__attribute__((constructor)) static void start(void) {
  real_fsync = dlsym(RTLD_NEXT, "fsync");
  real_fdatasync = dlsym(RTLD_NEXT, "fdatasync");
  const char *path = getenv("BENCH_SYNCS");
  int fd = path ? open(path, O_RDWR) : -1;
  if (fd < 0) return;
  void *page = mmap(NULL, sizeof(long), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (page != MAP_FAILED) count = page;
  close(fd);
}

int fsync(int fd) {
  atomic_fetch_add_explicit(count, 1, memory_order_relaxed);
  return real_fsync(fd);
}

int fdatasync(int fd) {
  atomic_fetch_add_explicit(count, 1, memory_order_relaxed);
  return real_fdatasync(fd);
}
