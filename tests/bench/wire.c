// A long line between two network namespaces, for kernels without netem: what tc's `delay`, `loss`, `rate` and `limit`
// do, by a process that passes packets from one tun device to another.
//
//     wire NAMESPACE_A NAMESPACE_B DEVICE MILLISECONDS LOSS BITS_PER_SECOND PACKETS
//
// It makes DEVICE in both namespaces, prints "ready", and passes packets until it is killed. Each direction delays every
// packet by MILLISECONDS, loses one with probability LOSS, sends BITS_PER_SECOND, and holds at most PACKETS.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

enum { MTU = 2048 };

struct packet {
    int64_t due;
    int size;
    char data[MTU];
};

struct direction {
    int from, to;
    uint64_t random;
};

static int64_t delay_ns, rate_bps;
static double loss;
static int limit;

static void must(int ok, const char *what) {
    if (!ok) {
        fprintf(stderr, "wire: %s: %s\n", what, strerror(errno));
        exit(1);
    }
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

// The device belongs to the namespace in which /dev/net/tun is opened.
static int make_device(const char *space, const char *device) {
    char path[256];
    snprintf(path, sizeof path, "/run/netns/%s", space);
    int ns = open(path, O_RDONLY | O_CLOEXEC);
    must(ns >= 0, path);
    must(setns(ns, CLONE_NEWNET) == 0, "setns");
    close(ns);
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    must(fd >= 0, "/dev/net/tun");
    struct ifreq request = {0};
    request.ifr_flags = IFF_TUN | IFF_NO_PI;
    snprintf(request.ifr_name, IFNAMSIZ, "%s", device);
    must(ioctl(fd, TUNSETIFF, &request) == 0, "TUNSETIFF");
    return fd;
}

// splitmix64: the same losses in every run.
static double uniform(uint64_t *state) {
    uint64_t z = (*state += 0x9E3779B97F4A7C15ULL);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return (double)((z ^ (z >> 31)) >> 11) / 9007199254740992.0;
}

static void *carry(void *argument) {
    struct direction *d = argument;
    struct packet *ring = calloc((size_t)limit, sizeof *ring);
    must(ring != NULL, "memory");
    int head = 0, held = 0;
    int64_t free_at = 0; // when the line has sent what was given to it
    for (;;) {
        for (int many = 0; many < 256; many++) {
            char spare[MTU];
            struct packet *p = &ring[(head + held) % limit];
            // A full queue drops what comes.
            int n = (int)read(d->from, held < limit ? p->data : spare, MTU);
            if (n <= 0) {
                // Where no address is given yet, the device is down.
                must(n < 0 && (errno == EAGAIN || errno == EINTR || errno == EIO || errno == EBADFD), "read");
                break;
            }
            if (held == limit || uniform(&d->random) < loss)
                continue;
            int64_t now = now_ns();
            free_at = (free_at > now ? free_at : now) + n * 8000000000LL / rate_bps;
            p->due = free_at + delay_ns;
            p->size = n;
            held++;
        }
        int64_t now = now_ns();
        for (; held && ring[head].due <= now; held--, head = (head + 1) % limit)
            if (write(d->to, ring[head].data, (size_t)ring[head].size) < 0)
                must(errno == EAGAIN || errno == EIO || errno == EINVAL || errno == ENOBUFS, "write");
        struct timespec wait = {1, 0};
        if (held) {
            // Packets come every 12 microseconds at 1 Gbit/s: waking for each would take a processor.
            int64_t left = ring[head].due - now_ns();
            left = left > 200000 ? left : 200000;
            wait.tv_sec = left / 1000000000;
            wait.tv_nsec = left % 1000000000;
            if (wait.tv_sec == 0 && wait.tv_nsec <= 1000000) {
                nanosleep(&wait, NULL);
                continue;
            }
        }
        struct pollfd ready = {.fd = d->from, .events = POLLIN};
        ppoll(&ready, 1, &wait, NULL);
    }
    return NULL;
}

int main(int argc, char **argv) {
    must(argc == 8, "seven arguments are needed");
    delay_ns = (int64_t)(atof(argv[4]) * 1e6);
    loss = atof(argv[5]);
    rate_bps = atoll(argv[6]);
    limit = atoi(argv[7]);
    int a = make_device(argv[1], argv[3]), b = make_device(argv[2], argv[3]);
    struct direction there = {a, b, 1}, back = {b, a, 2};
    pthread_t thread;
    must(pthread_create(&thread, NULL, carry, &there) == 0, "pthread_create");
    puts("ready");
    fflush(stdout);
    carry(&back);
}
