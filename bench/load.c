/* The load of bench/network and bench/files: one static program, so that it runs in any container and on the host.
 *
 *   load serve PORT                           answer the clients below, until killed
 *   load send|receive HOST PORT SECONDS       bytes a second over one TCP connection, in 128 KiB pieces
 *   load echo HOST PORT SECONDS               one byte there and back, over one connection: p50 and p99 in us
 *   load connect HOST PORT SECONDS            connections with one request and answer, one after the other, a second
 *   load requests HOST PORT SECONDS COUNT     64-byte requests and answers a second, over COUNT connections at once
 *   load files DIRECTORY TEST MIB|COUNT       see the table at the end; operations or bytes a second
 *
 * One number (or two) on standard output; anything else is an error, on standard error, and status 1.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { PIECE = 128 << 10, MESSAGE = 64, MOST = 256, SAMPLES = 1 << 20 };

static char buffer[1 << 20];

static void die(const char *what)
{
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec + at.tv_nsec / 1e9;
}

static void whole(int fd, char *data, size_t size, int writing)
{
    while (size) {
        ssize_t done = writing ? send(fd, data, size, MSG_NOSIGNAL) : recv(fd, data, size, 0);
        if (done <= 0)
            die(writing ? "send" : "receive");
        data += done;
        size -= done;
    }
}

/* ---- the server: a process per connection, whose first byte says what it wants ---- */

static void answer(int fd)
{
    char kind;
    ssize_t got;
    if (recv(fd, &kind, 1, 0) != 1)
        return;
    if (kind == 's') {
        uint64_t total = 0;
        while ((got = recv(fd, buffer, PIECE, 0)) > 0)
            total += got;
        send(fd, &total, sizeof total, MSG_NOSIGNAL); /* what has arrived counts, not what was sent */
    } else if (kind == 'g') {
        while (send(fd, buffer, PIECE, MSG_NOSIGNAL) > 0)
            ;
    } else { /* echo */
        while ((got = recv(fd, buffer, PIECE, 0)) > 0)
            whole(fd, buffer, got, 1);
    }
}

static void no_delay(int fd)
{
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

static void serve(int port)
{
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(port)};
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&here, sizeof here) || listen(fd, MOST))
        die("listen");
    signal(SIGCHLD, SIG_IGN);
    for (;;) {
        int client = accept(fd, NULL, NULL);
        if (client < 0)
            continue;
        no_delay(client);
        if (fork() == 0) {
            answer(client);
            _exit(0);
        }
        close(client);
    }
}

/* ---- clients ---- */

static int dial(const char *host, int port, char kind)
{
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in there = {.sin_family = AF_INET, .sin_port = htons(port)};
    if (inet_pton(AF_INET, host, &there.sin_addr) != 1)
        die(host);
    if (connect(fd, (struct sockaddr *)&there, sizeof there))
        die("connect");
    no_delay(fd);
    whole(fd, &kind, 1, 1);
    return fd;
}

static void send_all(const char *host, int port, double seconds)
{
    int fd = dial(host, port, 's');
    uint64_t total;
    double began = now();
    while (now() - began < seconds)
        whole(fd, buffer, PIECE, 1);
    shutdown(fd, SHUT_WR);
    whole(fd, (char *)&total, sizeof total, 0);
    printf("%.0f\n", total / (now() - began));
}

static void receive_all(const char *host, int port, double seconds)
{
    int fd = dial(host, port, 'g');
    double total = 0, began = now();
    while (now() - began < seconds) {
        ssize_t got = recv(fd, buffer, PIECE, 0);
        if (got <= 0)
            die("receive");
        total += got;
    }
    printf("%.0f\n", total / (now() - began));
}

static int ascending(const void *one, const void *other)
{
    float a = *(const float *)one, b = *(const float *)other;
    return (a > b) - (a < b);
}

static void echo(const char *host, int port, double seconds)
{
    int fd = dial(host, port, 'e');
    static float took[SAMPLES];
    size_t count = 0;
    double began = now();
    char byte = 0;
    while (now() - began < seconds && count < SAMPLES) {
        double from = now();
        whole(fd, &byte, 1, 1);
        whole(fd, &byte, 1, 0);
        took[count++] = (now() - from) * 1e6;
    }
    qsort(took, count, sizeof *took, ascending);
    printf("%.1f %.1f\n", took[count / 2], took[count * 99 / 100]);
}

static void connections(const char *host, int port, double seconds)
{
    double count = 0, began = now();
    char byte = 0;
    struct linger at_once = {1, 0}; /* or the ports run out */
    for (; now() - began < seconds; count++) {
        int fd = dial(host, port, 'e');
        whole(fd, &byte, 1, 1);
        whole(fd, &byte, 1, 0);
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
        close(fd);
    }
    printf("%.1f\n", count / (now() - began));
}

static void requests(const char *host, int port, double seconds, int number)
{
    struct pollfd open[MOST];
    size_t got[MOST] = {0};
    double count = 0, began = now();
    if (number < 1 || number > MOST)
        number = MOST;
    for (int i = 0; i < number; i++) {
        open[i] = (struct pollfd){dial(host, port, 'e'), POLLIN, 0};
        whole(open[i].fd, buffer, MESSAGE, 1);
    }
    while (now() - began < seconds) {
        if (poll(open, number, 10000) <= 0)
            die("no answer");
        for (int i = 0; i < number; i++) {
            if (!open[i].revents)
                continue;
            ssize_t piece = recv(open[i].fd, buffer, MESSAGE - got[i], 0);
            if (piece <= 0)
                die("receive");
            if ((got[i] += piece) == MESSAGE) {
                got[i] = 0;
                count++;
                whole(open[i].fd, buffer, MESSAGE, 1);
            }
        }
    }
    printf("%.1f\n", count / (now() - began));
}

/* ---- files ---- */

static const char *place(const char *format, ...)
{
    static char path[4096];
    va_list more;
    va_start(more, format);
    vsnprintf(path, sizeof path, format, more);
    va_end(more);
    return path;
}

static int opened(const char *path, int flags)
{
    int fd = open(path, flags | O_CLOEXEC, 0644);
    if (fd < 0)
        die(path);
    return fd;
}

static void need(ssize_t result, const char *what)
{
    if (result < 0)
        die(what);
}

static double sequential(const char *dir, long mib, int writing)
{
    int fd = opened(place("%s/big", dir), writing ? O_WRONLY | O_CREAT | O_TRUNC : O_RDONLY);
    double began = now();
    for (long i = 0; i < mib; i++)
        if ((writing ? write(fd, buffer, 1 << 20) : read(fd, buffer, 1 << 20)) != 1 << 20)
            die("the big file");
    if (writing)
        need(fsync(fd), "fsync");
    return mib * 1048576.0 / (now() - began);
}

static double at_random(const char *dir, long count, int writing)
{
    int fd = opened(place("%s/big", dir), O_RDWR);
    struct stat about;
    need(fstat(fd, &about), "fstat");
    uint64_t seed = 1, blocks = about.st_size / 4096;
    if (!blocks)
        die("the big file is empty");
    double began = now();
    for (long i = 0; i < count; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        off_t at = (seed >> 33) % blocks * 4096;
        if ((writing ? pwrite(fd, buffer, 4096, at) : pread(fd, buffer, 4096, at)) != 4096)
            die("the big file");
    }
    if (writing)
        need(fsync(fd), "fsync");
    return count / (now() - began);
}

static double synced(const char *dir, long count)
{
    int fd = opened(place("%s/journal", dir), O_WRONLY | O_CREAT | O_TRUNC);
    double began = now();
    for (long i = 0; i < count; i++) {
        need(write(fd, buffer, 4096), "write");
        need(fsync(fd), "fsync");
    }
    return count / (now() - began);
}

static double small(const char *dir, long count, char what)
{
    struct stat about;
    double began = now();
    if (what == 'c')
        need(mkdir(place("%s/small", dir), 0755), "mkdir");
    for (long i = 0; i < count; i++) {
        const char *path = place("%s/small/%ld", dir, i);
        if (what == 's') {
            need(stat(path, &about), path);
        } else if (what == 'u') {
            need(unlink(path), path);
        } else {
            int fd = opened(path, what == 'c' ? O_WRONLY | O_CREAT | O_EXCL : O_RDONLY);
            need(what == 'c' ? write(fd, buffer, 4096) : read(fd, buffer, 4096), path);
            close(fd);
        }
    }
    if (what == 'u')
        need(rmdir(place("%s/small", dir)), "rmdir");
    return count / (now() - began);
}

static double files(const char *dir, const char *test, long amount)
{
    if (!strcmp(test, "write")) return sequential(dir, amount, 1);
    if (!strcmp(test, "read")) return sequential(dir, amount, 0);
    if (!strcmp(test, "random-write")) return at_random(dir, amount, 1);
    if (!strcmp(test, "random-read")) return at_random(dir, amount, 0);
    if (!strcmp(test, "fsync")) return synced(dir, amount);
    if (!strcmp(test, "create")) return small(dir, amount, 'c');
    if (!strcmp(test, "open-read")) return small(dir, amount, 'r');
    if (!strcmp(test, "stat")) return small(dir, amount, 's');
    if (!strcmp(test, "unlink")) return small(dir, amount, 'u');
    errno = EINVAL;
    die(test);
    return 0;
}

int main(int count, char **words)
{
    memset(buffer, 'x', sizeof buffer);
    const char *what = count > 1 ? words[1] : "";
    int port = count > 3 ? atoi(words[3]) : 0;
    double seconds = count > 4 ? atof(words[4]) : 0;
    if (!strcmp(what, "serve") && count == 3)
        serve(atoi(words[2]));
    else if (!strcmp(what, "files") && count == 5)
        printf("%.1f\n", files(words[2], words[3], atol(words[4])));
    else if (!strcmp(what, "send") && count == 5)
        send_all(words[2], port, seconds);
    else if (!strcmp(what, "receive") && count == 5)
        receive_all(words[2], port, seconds);
    else if (!strcmp(what, "echo") && count == 5)
        echo(words[2], port, seconds);
    else if (!strcmp(what, "connect") && count == 5)
        connections(words[2], port, seconds);
    else if (!strcmp(what, "requests") && count == 6)
        requests(words[2], port, seconds, atoi(words[5]));
    else {
        fprintf(stderr, "load: see the top of bench/load.c\n");
        return 1;
    }
    return 0;
}
