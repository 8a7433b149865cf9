/* What share_cases.py does to files from within a guest, or on the host: one word names what, then come its paths.
 * It prints what came out in one line, and ends with 0 unless it could not even begin. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

static int begin(const char *path, int flags)
{
    int fd = open(path, flags, 0644);
    if (fd < 0) {
        perror(path);
        exit(2);
    }
    return fd;
}

/* A line of several answers: the name of what worked, "no NAME (why)" of what did not. */
static void answer(const char *name, int failed)
{
    if (failed)
        printf("no %s (%s), ", name, strerror(errno));
    else
        printf("%s, ", name);
}

static void appended(const char *path, long count, const char *word)
{
    int fd = begin(path, O_WRONLY | O_CREAT | O_APPEND);
    char line[64];
    int length = snprintf(line, sizeof line, "%s\n", word);
    for (long n = 0; n < count; n++) {
        if (write(fd, line, length) != length) perror("write");
        usleep(2000);
    }
    printf("appended\n");
}

/* A file that has no name any more, open. */
static void unlinked(const char *path)
{
    int fd = begin(path, O_RDWR | O_CREAT | O_TRUNC);
    struct timespec times[2] = {{1, 0}, {2, 3}};
    struct stat is;
    unlink(path);
    answer("ftruncate", ftruncate(fd, 131072));
    answer("fchmod", fchmod(fd, 0600));
    answer("fchown", fchown(fd, 12, 34));
    answer("futimens", futimens(fd, times));
    char *map = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    answer("mmap", map == MAP_FAILED);
    answer("fstat", fstat(fd, &is));
    printf("%ld %o %d %ld.%ld\n", (long)is.st_size, is.st_mode & 0777, (int)is.st_uid, (long)is.st_mtim.tv_sec,
           is.st_mtim.tv_nsec);
}

/* A database's two ways to one file: through a mapping that others have too, and by calls. */
static void mapped(const char *path)
{
    int fd = begin(path, O_RDWR | O_CREAT | O_TRUNC);
    char byte = 0;
    if (ftruncate(fd, 8192)) perror("ftruncate");
    char *map = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) {
        printf("%s\n", strerror(errno));
        return;
    }
    map[5000] = 'm';
    int seen = pread(fd, &byte, 1, 5000) == 1 && byte == 'm';
    int sent = pwrite(fd, "w", 1, 6000) == 1 && map[6000] == 'w';
    int synced = msync(map, 8192, MS_SYNC) == 0;
    printf("%s %s %s\n", seen ? "seen" : "not seen", sent ? "sent" : "not sent", synced ? "synced" : "not synced");
}

static void nodes(const char *directory)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (chdir(directory)) perror(directory);
    answer("fifo", mkfifo("a-fifo", 0600));
    strcpy(address.sun_path, "a-socket");
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    answer("socket", bind(fd, (void *)&address, sizeof address) || listen(fd, 1));
    answer("connect", connect(socket(AF_UNIX, SOCK_STREAM, 0), (void *)&address, sizeof address));
    printf("\n");
}

static void modern(const char *directory)
{
    struct timespec times[2] = {{1, 0}, {1, 7}};
    struct stat is = {0};
    /* A file capability of version 2: cap_net_raw, permitted and effective. */
    static const uint32_t capability[5] = {0x02000001, 1 << 13};
    static const uint8_t list[] = {2,    0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2,    0,    4,    0,    99, 0, 0, 0, 4, 0,
                                   4,    0, 255, 255, 255, 255, 0x10, 0, 4, 0, 255, 255, 255, 255, 0x20, 0, 4, 0, 255, 255,
                                   255,  255};
    if (chdir(directory)) perror(directory);
    int fd = begin("one", O_RDWR | O_CREAT | O_TRUNC);
    close(begin("two", O_RDWR | O_CREAT | O_TRUNC));
    answer("fallocate", fallocate(fd, 0, 0, 65536));
    answer("punch", fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 4096, 4096));
    answer("O_TMPFILE", open(".", O_RDWR | O_TMPFILE, 0600) < 0);
    answer("exchange", renameat2(AT_FDCWD, "one", AT_FDCWD, "two", RENAME_EXCHANGE));
    answer("noreplace", !(renameat2(AT_FDCWD, "one", AT_FDCWD, "two", RENAME_NOREPLACE) && errno == EEXIST));
    answer("capability", setxattr("one", "security.capability", capability, sizeof capability, 0));
    answer("ACL", setxattr("two", "system.posix_acl_access", list, sizeof list, 0));
    int failed = utimensat(AT_FDCWD, "one", times, 0) || stat("one", &is);
    if (!failed && is.st_mtim.tv_nsec != 7) failed = 1, errno = ERANGE;
    answer("nanoseconds", failed);
    printf("\n");
}

static void lock(const char *path, int hold)
{
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET}, ofd = whole;
    int fd = begin(path, O_RDWR | O_CREAT), other = begin(path, O_RDWR);
    answer("flock", flock(fd, LOCK_EX | LOCK_NB));
    answer("fcntl", fcntl(fd, F_SETLK, &whole));
    ofd.l_start = 10; /* beyond what fcntl has: they are different owners */
    if (fcntl(fd, F_SETLK, &(struct flock){.l_type = F_UNLCK, .l_whence = SEEK_SET, .l_start = 10})) perror("unlock");
    answer("OFD", fcntl(other, F_OFD_SETLK, &ofd));
    printf("\n");
    fflush(stdout);
    if (hold) pause();
}

/* Waits until somebody else makes something in a directory, and for how far that reaches. */
static void watch(const char *directory)
{
    struct pollfd one = {inotify_init(), POLLIN, 0};
    struct statfs is;
    if (inotify_add_watch(one.fd, directory, IN_CREATE) < 0 || statfs(directory, &is)) perror(directory);
    printf("watching\n");
    fflush(stdout);
    int told = poll(&one, 1, 3000) > 0;
    const char *kind = is.f_type == 0x65735546 ? "fuse" : is.f_type == 0x01021997 ? "9p" : "local";
    printf("%s, %s\n", told ? "told" : "not told", kind);
}

/* Holds a file open, and says what is in it each time a line comes in. */
static void follow(const char *path)
{
    int fd = begin(path, O_RDONLY);
    char words[16], room[256];
    ssize_t got = read(fd, room, sizeof room);
    do {
        for (ssize_t n = 0; n < got; n++)
            if (room[n] == '\n' || room[n] == 0) room[n] = room[n] ? ' ' : '0';
        printf("%.*s\n", got > 0 ? (int)got : 0, room);
        fflush(stdout);
    } while (fgets(words, sizeof words, stdin) && (got = pread(fd, room, sizeof room, 0)) >= 0);
}

/* Has the kernel keep a directory's programs, or let go of their pages. Nothing else uses these pages in between. */
static void pages(const char *directory, long count, int keep)
{
    static char room[1 << 17];
    char path[64];
    for (long n = 0; n < count; n++) {
        snprintf(path, sizeof path, "%s/%ld", directory, n);
        int fd = begin(path, O_RDONLY);
        if (keep && read(fd, room, sizeof room) <= 0) perror(path);
        if (!keep) posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
        close(fd);
    }
}

/* What a program of these ends with: each of its 32 pages has the constant in its code (share_cases.py makes them). */
static int ending(int constant)
{
    int sum = 0;
    for (int page = 0; page < 32; page++) sum = (sum * 3 + constant) & 255;
    return sum;
}

/* Runs a directory's programs, which are called 0, 1, ... One that ends with what another's code has ended in has run that
 * other's. Their pages are filled all at once, and free afterwards. */
static void programs(const char *directory, long count, long more)
{
    char path[64];
    long wrong = 0;
    pages(directory, count, 1);
    for (long n = 0; n < count; n++) {
        int status = 0;
        snprintf(path, sizeof path, "%s/%ld", directory, n);
        pid_t child = fork();
        if (child == 0) {
            execl(path, path, NULL);
            _exit(255);
        }
        waitpid(child, &status, 0);
        wrong += !WIFEXITED(status) || WEXITSTATUS(status) != ending((n + more) % 251 + 1);
    }
    pages(directory, count, 0);
    printf("%ld of %ld wrong\n", wrong, count);
}

int main(int count, char **words)
{
    const char *what = count > 2 ? words[1] : "";
    if (!strcmp(what, "append") && count == 5) appended(words[2], atol(words[3]), words[4]);
    else if (!strcmp(what, "unlinked")) unlinked(words[2]);
    else if (!strcmp(what, "mapped")) mapped(words[2]);
    else if (!strcmp(what, "nodes")) nodes(words[2]);
    else if (!strcmp(what, "modern")) modern(words[2]);
    else if (!strcmp(what, "lock")) lock(words[2], 0);
    else if (!strcmp(what, "hold")) lock(words[2], 1);
    else if (!strcmp(what, "watch")) watch(words[2]);
    else if (!strcmp(what, "follow")) follow(words[2]);
    else if (!strcmp(what, "programs") && count == 5) programs(words[2], atol(words[3]), atol(words[4]));
    else return 2;
    return 0;
}
