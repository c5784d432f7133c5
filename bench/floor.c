/*
 * The floor: what the kernel alone costs. A room in C that does the least that can
 * be called fan-out: one thread, one epoll, one plain loop of send() of the same
 * bytes to every socket. No server that delivers to N sockets with one send each
 * can be cheaper, so the benchmark states costs as multiples of this.
 *
 * It speaks just enough of the broker's protocol for the load client: the upgrade
 * (without computing Sec-WebSocket-Accept), a welcome, "ok" to whatever holds
 * "join", and for a publish the same text with the head of an event. All sockets
 * are in one room. A frame the kernel does not take at once is dropped and shows
 * as lost in the analysis.
 *
 * Use: floor; prints "ready ws://127.0.0.1:PORT/ws"; ends with SIGTERM.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define SOCKETS 65536
#define BUFFER 8192

struct reader {
    int upgraded, used;
    unsigned char bytes[BUFFER];
};

static struct reader *readers[SOCKETS];
static int room[SOCKETS], members, poller;

static int frame(unsigned char *out, const char *text, int length)
{
    int at = 2;
    out[0] = 0x81;
    out[1] = length < 126 ? (unsigned char)length : 126;
    if (length >= 126) {
        out[at++] = (unsigned char)(length >> 8);
        out[at++] = (unsigned char)length;
    }
    memcpy(out + at, text, (size_t)length);
    return at + length;
}

static void say(int fd, const char *text)
{
    unsigned char out[256];
    send(fd, out, (size_t)frame(out, text, (int)strlen(text)), MSG_DONTWAIT | MSG_NOSIGNAL);
}

static void leave(int fd)
{
    for (int i = 0; i < members; i++)
        if (room[i] == fd)
            room[i] = room[--members];
    free(readers[fd]);
    readers[fd] = NULL;
    close(fd);
}

/* {"op":"publish","room":…} becomes [{"op":"event","room":…,"ts":…}]. */
static void publish(const char *text, int length)
{
    static char event[BUFFER + 64];
    static unsigned char out[BUFFER + 96];
    struct timespec now;
    const char head[] = "{\"op\":\"publish\"";
    int skip = (int)sizeof head - 1;
    clock_gettime(CLOCK_REALTIME, &now);
    int size = snprintf(event, sizeof event, "[{\"op\":\"event\"%.*s,\"ts\":%ld.%06ld}]", length - skip - 1, text + skip,
                        (long)now.tv_sec, now.tv_nsec / 1000);
    int bytes = frame(out, event, size);
    for (int i = 0; i < members; i++)
        send(room[i], out, (size_t)bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static int message(int fd, struct reader *reader) /* one masked frame; returns the bytes used, -1 to close */
{
    unsigned char *p = reader->bytes;
    int head = 6, size = p[1] & 0x7f;
    if (reader->used < 2)
        return 0;
    if (size == 126) {
        if (reader->used < 4)
            return 0;
        head = 8;
        size = p[2] << 8 | p[3];
    }
    if (size + head > BUFFER || (p[1] & 0x7f) == 127 || (p[0] & 0x0f) == 8)
        return -1;
    if (reader->used < size + head)
        return 0;
    for (int i = 0; i < size; i++)
        p[head + i] ^= p[head - 4 + (i & 3)];
    char *text = (char *)p + head;
    if (memmem(text, (size_t)size, "{\"op\":\"publish\"", 15) == text) {
        publish(text, size);
    } else if (memmem(text, (size_t)size, "\"join\"", 6)) {
        room[members++] = fd;
        say(fd, "[{\"op\":\"ok\",\"id\":1}]");
    } else {
        say(fd, "[{\"op\":\"ok\",\"id\":2}]");
    }
    return size + head;
}

static void readable(int fd)
{
    struct reader *reader = readers[fd];
    ssize_t got = recv(fd, reader->bytes + reader->used, (size_t)(BUFFER - reader->used), MSG_DONTWAIT);
    if (got <= 0) {
        if (got == 0 || errno != EAGAIN)
            leave(fd);
        return;
    }
    reader->used += (int)got;
    int used = 0;
    if (!reader->upgraded) {
        unsigned char *end = memmem(reader->bytes, (size_t)reader->used, "\r\n\r\n", 4);
        if (end == NULL)
            return;
        const char answer[] = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                              "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
        send(fd, answer, sizeof answer - 1, MSG_DONTWAIT | MSG_NOSIGNAL);
        say(fd, "[{\"op\":\"welcome\",\"protocol\":1}]");
        reader->upgraded = 1;
        used = (int)(end - reader->bytes) + 4;
    }
    do {
        reader->used -= used;
        memmove(reader->bytes, reader->bytes + used, (size_t)reader->used);
        used = message(fd, reader);
    } while (used > 0);
    if (used < 0)
        leave(fd);
}

int main(void)
{
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int on = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (bind(listener, (struct sockaddr *)&address, size) || listen(listener, 4096) ||
        getsockname(listener, (struct sockaddr *)&address, &size)) {
        perror("floor");
        return 1;
    }
    poller = epoll_create1(EPOLL_CLOEXEC);
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &(struct epoll_event){.events = EPOLLIN, .data.fd = listener});
    printf("ready ws://127.0.0.1:%d/ws\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        struct epoll_event events[256];
        int count = epoll_wait(poller, events, 256, -1);
        for (int i = 0; i < count; i++) {
            int fd = events[i].data.fd;
            if (fd != listener) {
                readable(fd);
                continue;
            }
            while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
                if (fd >= SOCKETS || (readers[fd] = calloc(1, sizeof(struct reader))) == NULL) {
                    close(fd);
                    continue;
                }
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                epoll_ctl(poller, EPOLL_CTL_ADD, fd, &(struct epoll_event){.events = EPOLLIN, .data.fd = fd});
            }
        }
    }
}
