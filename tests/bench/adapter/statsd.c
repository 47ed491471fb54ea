/* Sends StatsD over UDP: `statsd PORT SECONDS LINES_PER_SECOND`, 0 = as fast as it goes. Prints what it sent as JSON.

   A datagram has 40 lines, each of another series: 20 counters that grow by one, 10 gauges, 10 timers, all tagged. */

#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum { KINDS = 3, LINES = 40 };

static double now(void) {
  struct timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return (double)at.tv_sec + (double)at.tv_nsec / 1e9;
}

static size_t fill(char *text, size_t room, int which) {
  size_t size = 0;
  for (int line = 0; line < LINES; line++) {
    const char *end = line + 1 < LINES ? "\n" : "";
    int part = which * LINES + line;
    if (line < LINES / 2)
      size += (size_t)snprintf(text + size, room - size, "shop.orders:1|c|#part:%d,zone:east%s", part, end);
    else if (line < LINES * 3 / 4)
      size += (size_t)snprintf(text + size, room - size, "shop.queue.depth:%d|g|#part:%d%s", line, part, end);
    else
      size += (size_t)snprintf(text + size, room - size, "shop.reply:%d.5|ms|#part:%d%s", line, part, end);
  }
  return size;
}

int main(int argc, char **argv) {
  if (argc != 4)
    return 2;
  struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((unsigned short)atoi(argv[1]))};
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  double seconds = atof(argv[2]), pace = atof(argv[3]) / LINES;
  int link = socket(AF_INET, SOCK_DGRAM, 0);
  if (link < 0 || connect(link, (struct sockaddr *)&to, sizeof to))
    return 1;
  static char text[KINDS][4096];
  size_t size[KINDS];
  for (int which = 0; which < KINDS; which++)
    size[which] = fill(text[which], sizeof text[which], which);
  long sent = 0;
  double began = now();
  for (;;) {
    double passed = now() - began;
    if (passed >= seconds)
      break;
    if (pace > 0 && (double)sent > passed * pace) {
      struct timespec rest = {0, 200000};
      nanosleep(&rest, NULL);
      continue;
    }
    int which = (int)(sent % KINDS);
    if (send(link, text[which], size[which], 0) != (ssize_t)size[which])
      return 1;
    sent++;
  }
  printf("{\"sent\": %ld, \"lines\": %d, \"counters\": %d, \"seconds\": %f}\n", sent, LINES, LINES / 2, now() - began);
  return 0;
}
