/*
 * The load client: opens connections, publishes on a schedule, records what comes.
 *
 * Theory. A benchmark of a broker must cost less than the broker, or it measures
 * itself; it must also prove that every event arrived. Decoding millions of
 * deliveries a second while they arrive is out of reach, so this program decodes
 * nothing: it cuts the byte stream into WebSocket frames and writes down (time,
 * connection, which payload), where the payload is known by a 64-bit hash and
 * kept once. A thousand sessions of one room receive the same bytes, so a run of
 * millions of deliveries holds few distinct payloads; bench/analysis.py decodes
 * each of them once, after the run, and checks every connection against the
 * schedule.
 *
 * The load is open loop: each publish has an intended moment in the plan and is
 * sent then (or as soon after as possible), whether or not earlier ones were
 * answered, and latency counts from the intended moment, so that a stalled
 * server cannot slow its own clock (coordinated omission).
 *
 * A backend publishes by PUBLISH to Redis; it takes part as a connection that
 * speaks Redis instead of WebSocket, on the same schedule.
 *
 * Use: load PLAN RECORDING. The plan's layout is written by bench/plan.py, the
 * recording's is read by bench/recording.py; both mirror the structs below, in
 * native byte order. Talks with its parent in lines: on standard output
 * "setup A B", "ready A B", "publish A B", "settle A B", "done A B"; on standard
 * input "go" (after ready) and "end" (after ready or done). End of input ends it.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define NONE UINT32_MAX
#define SECOND 1000000000ull
#define READ_BYTES (256u << 10)      /* one recv; stays in the second-level cache */
#define RECORDS_MAX (256ull << 20)   /* records; 4 GiB of address space, touched as used */
#define ARENA_MAX (4ull << 30)       /* bytes of distinct payloads, likewise */
#define PAYLOADS_MAX (64ull << 20)   /* distinct payloads, likewise */
#define FRAME_MAX (64u << 20)        /* a longer frame is a broken server */
#define CONNECTS_PER_PASS 32         /* so that answers are read while a storm is started */
#define EVENTS_PER_CHECK 16          /* socket events handled between two looks at the schedule */
#define REPORT_EVERY (SECOND / 5)

/* ---- plan (bench/plan.py) and recording (bench/recording.py) ---- */

struct plan_header {
    char magic[8]; /* "blplan2" */
    u32 sources, connections, requests, messages, scripts, templates, publishes;
    u32 in_flight; /* connections being set up at once; 0: all */
    u32 engine_io; /* answer the text "2" with "3" (Engine.IO's own ping) */
    u32 gather;    /* publishes of one connection, due at one moment, that may go out as one */
    u64 connect_gap; /* ns between two connects; 0: none */
    u64 setup_timeout, lead, quiet, settle_timeout; /* ns */
};

struct plan_connection {
    u32 request, script, final, flags, receive_buffer, port;
};
#define STOPS_READING 1u /* once ready, reads nothing until all is published */
#define SPEAKS_REDIS 2u  /* no WebSocket: its templates are commands of Redis, each answered by one line */

struct plan_publish {
    u64 at; /* ns after the start */
    u32 connection, template;
};

struct text {
    u32 length, mark; /* mark: where the 10 digits of the sequence number go */
    const u8 *bytes;
};

struct script {
    u32 count;
    const u32 *messages;
};

struct outcome {
    u64 started, upgraded, ready, ended; /* ns; 0: never */
    u64 frames, bytes;                   /* data frames received, with their headers */
    u32 why, detail, pings, unused;
};
enum why { FINE, CONNECT_FAILED, UPGRADE_REFUSED, CLOSED, END_OF_FILE, SOCKET_ERROR, BAD_FRAME };

struct record {
    u64 at;
    u32 connection, payload;
};

struct payload {
    u64 offset;
    u32 length, head; /* head: first byte of the frame: FIN, RSV1-3, opcode */
};

struct recording_header {
    char magic[8]; /* "blrec01" */
    u64 records, payloads, arena, overflow;
    u64 setup_started, setup_ended, started, published, last_data, ended;
    u32 connections, publishes, finals_missing, unsent_bytes;
};

/* ---- state ---- */

enum state { WAITING, CONNECTING, UPGRADING, OPENING, READY, GONE };

struct connection {
    int fd;
    u8 state, paused, final_sent;
    u32 step;
    u8 *in, *out; /* bytes of an unfinished frame; bytes the kernel did not take */
    u32 in_used, in_size, out_from, out_used, out_size;
};

enum phase { SETUP, HELD, PUBLISHING, SETTLING, RESUMED, DONE };

static struct plan_header plan;
static struct text *requests, *messages, *templates;
static struct script *scripts;
static const struct plan_connection *planned;
static const struct plan_publish *publishes;

static struct connection *connections;
static struct outcome *outcomes;
static u64 *sent_at;
static struct record *records;
static struct payload *payloads;
static u8 *arena;
static u64 record_count, payload_count, arena_used, overflow;
static u64 *slot_hash;
static u32 *slot_payload, slots;

static int poller;
static u8 *scratch;
static enum phase phase;
static u32 started, ready, gone_in_setup, next_publish, finals_missing, resumed;
static u64 setup_started, setup_ended, start, published, settling, last_data, pending_out, random_state;
static int told_go, told_end;

static u64 clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (u64)t.tv_sec * SECOND + (u64)t.tv_nsec;
}

static void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("load: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(2);
}

static void *reserve(u64 bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        die("cannot reserve %llu bytes: %s", (unsigned long long)bytes, strerror(errno));
    madvise(memory, bytes, MADV_HUGEPAGE);
    return memory;
}

static void *grow(void *memory, u64 bytes)
{
    void *larger = realloc(memory, bytes);
    if (larger == NULL)
        die("out of memory");
    return larger;
}

static u32 random32(void) /* xorshift64*: masks need no secrecy here */
{
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (u32)((random_state * 0x2545F4914F6CDD1Dull) >> 32);
}

/* ---- plan ---- */

static const u8 *cursor, *plan_end;

static const void *take(u64 bytes)
{
    const u8 *taken = cursor;
    if (bytes > (u64)(plan_end - cursor))
        die("the plan is cut short");
    cursor += (bytes + 7) & ~7ull; /* every item is padded to 8 bytes */
    return taken;
}

static struct text *take_texts(u32 count)
{
    struct text *texts = calloc(count + 1, sizeof *texts);
    for (u32 i = 0; i < count; i++) {
        const u32 *head = take(8);
        texts[i] = (struct text){.length = head[0], .mark = head[1], .bytes = take(head[0])};
    }
    return texts;
}

static void read_plan(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    off_t size = fd < 0 ? -1 : lseek(fd, 0, SEEK_END);
    if (size <= 0)
        die("%s: %s", path, strerror(errno));
    cursor = mmap(NULL, (size_t)size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
    if (cursor == MAP_FAILED)
        die("%s: %s", path, strerror(errno));
    close(fd);
    plan_end = cursor + size;
    memcpy(&plan, take(sizeof plan), sizeof plan);
    if (memcmp(plan.magic, "blplan2", 8) != 0)
        die("%s is no plan", path);
    requests = take_texts(plan.requests);
    messages = take_texts(plan.messages);
    templates = take_texts(plan.templates);
    scripts = calloc(plan.scripts + 1, sizeof *scripts);
    for (u32 i = 0; i < plan.scripts; i++) {
        scripts[i].count = *(const u32 *)take(4);
        scripts[i].messages = take(4ull * scripts[i].count);
    }
    planned = take(sizeof *planned * (u64)plan.connections);
    publishes = take(sizeof *publishes * (u64)plan.publishes);
}

/* ---- recording ---- */

static u64 mix(u64 a, u64 b)
{
    __uint128_t product = (__uint128_t)a * b;
    return (u64)product ^ (u64)(product >> 64);
}

static u64 word(const u8 *p)
{
    u64 value;
    memcpy(&value, p, 8);
    return value;
}

static u64 hash(const u8 *p, u32 length, u8 head) /* wyhash's folded multiply, 16 bytes a step */
{
    const u64 k0 = 0xa0761d6478bd642full, k1 = 0xe7037ed1a0b428dbull, k2 = 0x8ebc6af09c88c6e3ull;
    u64 value = mix(length ^ k0, head ^ k1);
    for (; length > 16; p += 16, length -= 16)
        value = mix(word(p) ^ k1, word(p + 8) ^ value);
    u8 tail[16] = {0};
    memcpy(tail, p, length);
    value = mix(word(tail) ^ k1, word(tail + 8) ^ value);
    value = mix(value ^ k2, k1);
    return value ? value : 1; /* 0 marks an empty slot */
}

static void rehash(void)
{
    u32 old_slots = slots;
    u64 *old_hash = slot_hash;
    u32 *old_payload = slot_payload;
    slots = old_slots ? old_slots * 2 : 1u << 18;
    slot_hash = calloc(slots, sizeof *slot_hash);
    slot_payload = calloc(slots, sizeof *slot_payload);
    if (slot_hash == NULL || slot_payload == NULL)
        die("out of memory");
    for (u32 i = 0; i < old_slots; i++) {
        if (old_hash[i] == 0)
            continue;
        u32 at = (u32)old_hash[i] & (slots - 1);
        while (slot_hash[at])
            at = (at + 1) & (slots - 1);
        slot_hash[at] = old_hash[i];
        slot_payload[at] = old_payload[i];
    }
    free(old_hash);
    free(old_payload);
}

static u32 intern(const u8 *bytes, u32 length, u8 head)
{
    u64 value = hash(bytes, length, head);
    u32 at = (u32)value & (slots - 1);
    for (; slot_hash[at]; at = (at + 1) & (slots - 1))
        if (slot_hash[at] == value)
            return slot_payload[at];
    if (arena_used + length > ARENA_MAX || payload_count == PAYLOADS_MAX) {
        overflow++;
        return NONE;
    }
    memcpy(arena + arena_used, bytes, length);
    payloads[payload_count] = (struct payload){.offset = arena_used, .length = length, .head = head};
    arena_used += length;
    slot_hash[at] = value;
    slot_payload[at] = (u32)payload_count++;
    if (payload_count * 2 > slots)
        rehash();
    return (u32)payload_count - 1;
}

static void write_all(int fd, const void *data, u64 bytes)
{
    for (const u8 *p = data; bytes;) {
        ssize_t written = write(fd, p, bytes > (1u << 30) ? 1u << 30 : bytes);
        if (written <= 0)
            die("cannot write the recording: %s", strerror(errno));
        p += written;
        bytes -= (u64)written;
    }
}

static void write_recording(const char *path)
{
    struct recording_header header = {
        .magic = "blrec01", .records = record_count, .payloads = payload_count, .arena = arena_used,
        .overflow = overflow, .setup_started = setup_started, .setup_ended = setup_ended, .started = start,
        .published = published, .last_data = last_data, .ended = clock_ns(), .connections = plan.connections,
        .publishes = plan.publishes, .finals_missing = finals_missing, .unsent_bytes = (u32)pending_out,
    };
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0)
        die("%s: %s", path, strerror(errno));
    write_all(fd, &header, sizeof header);
    write_all(fd, outcomes, sizeof *outcomes * (u64)plan.connections);
    write_all(fd, sent_at, sizeof *sent_at * (u64)plan.publishes);
    write_all(fd, records, sizeof *records * record_count);
    write_all(fd, payloads, sizeof *payloads * payload_count);
    write_all(fd, arena, arena_used);
    close(fd);
}

/* ---- sockets ---- */

static void watch(u32 index, u32 events)
{
    struct epoll_event event = {.events = events, .data.u32 = index};
    epoll_ctl(poller, EPOLL_CTL_MOD, connections[index].fd, &event);
}

static u32 interest(const struct connection *c)
{
    return (c->paused ? 0 : EPOLLIN) | (c->out_used > c->out_from ? EPOLLOUT : 0);
}

static void end_connection(u32 index, enum why why, u32 detail)
{
    struct connection *c = &connections[index];
    if (c->state == GONE)
        return;
    if (c->state < READY && phase == SETUP)
        gone_in_setup++;
    if (c->final_sent)
        c->final_sent = 0; /* its answer stays missing */
    pending_out -= c->out_used - c->out_from;
    outcomes[index].ended = clock_ns();
    outcomes[index].why = why;
    outcomes[index].detail = detail;
    if (c->fd >= 0)
        close(c->fd);
    free(c->in);
    free(c->out);
    *c = (struct connection){.fd = -1, .state = GONE};
}

static void send_bytes(u32 index, const u8 *bytes, u32 length)
{
    struct connection *c = &connections[index];
    u32 sent = 0;
    if (c->out_used == c->out_from) {
        ssize_t taken = send(c->fd, bytes, length, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (taken < 0 && errno != EAGAIN) {
            end_connection(index, SOCKET_ERROR, (u32)errno);
            return;
        }
        sent = taken < 0 ? 0 : (u32)taken;
        if (sent == length)
            return;
        c->out_from = c->out_used = 0;
    }
    if (c->out_used + length - sent > c->out_size) {
        c->out_size = (c->out_used + length - sent) * 2;
        c->out = grow(c->out, c->out_size);
    }
    memcpy(c->out + c->out_used, bytes + sent, length - sent);
    c->out_used += length - sent;
    pending_out += length - sent;
    watch(index, interest(c));
}

static void flush(u32 index)
{
    struct connection *c = &connections[index];
    ssize_t taken = send(c->fd, c->out + c->out_from, c->out_used - c->out_from, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (taken < 0) {
        if (errno != EAGAIN)
            end_connection(index, SOCKET_ERROR, (u32)errno);
        return;
    }
    c->out_from += (u32)taken;
    pending_out -= (u32)taken;
    if (c->out_from == c->out_used)
        watch(index, interest(c));
}

/* What is to be sent is put at outgoing + HEAD_MAX, so that a head of any length fits in front of it. */
#define HEAD_MAX 14u
#define OUTGOING_MAX (1u << 20)
static u8 outgoing[HEAD_MAX + OUTGOING_MAX];

/* Appends a text to what has `length` bytes so far; a mark in it becomes `number`. Returns the length then. */
static u32 put(u32 length, const struct text *text, u32 number)
{
    u8 *to = outgoing + HEAD_MAX + length;
    if (text->length > OUTGOING_MAX - 2 - length) /* 2: a bracket or a comma, and a bracket */
        die("a message of more than %u bytes is too long", OUTGOING_MAX);
    memcpy(to, text->bytes, text->length);
    if (text->mark != NONE)
        for (int digit = 9; digit >= 0; digit--, number /= 10)
            to[text->mark + (u32)digit] = (u8)('0' + number % 10);
    return length + text->length;
}

/* Sends the first `length` bytes that were put, as one masked client frame (RFC 6455 section 5.3). */
static void send_put(u32 index, u8 opcode, u32 length)
{
    u8 *payload = outgoing + HEAD_MAX;
    u32 size = length < 126 ? 6 : length < 65536 ? 8 : 14, mask = random32();
    u8 *frame = payload - size;
    frame[0] = 0x80 | opcode;
    if (length < 126) {
        frame[1] = 0x80 | (u8)length;
    } else if (length < 65536) {
        frame[1] = 0x80 | 126;
        frame[2] = (u8)(length >> 8);
        frame[3] = (u8)length;
    } else {
        frame[1] = 0x80 | 127;
        for (int i = 0; i < 8; i++)
            frame[2 + i] = (u8)((u64)length >> (56 - 8 * i));
    }
    memcpy(payload - 4, &mask, 4);
    u64 mask8 = ((u64)mask << 32) | mask;
    u32 i = 0;
    for (; i + 8 <= length; i += 8) {
        u64 value = word(payload + i) ^ mask8;
        memcpy(payload + i, &value, 8);
    }
    for (; i < length; i++)
        payload[i] ^= ((u8 *)&mask)[i & 3];
    send_bytes(index, frame, size + length);
}

static void send_frame(u32 index, u8 opcode, const struct text *text, u32 number)
{
    send_put(index, opcode, put(0, text, number));
}

/* `count` publishes as one array of messages, or as one write of commands. */
static void send_publishes(u32 index, u32 first, u32 count)
{
    int redis = planned[index].flags & SPEAKS_REDIS, array = !redis && count > 1;
    u32 length = 0;
    for (u32 i = 0; i < count; i++) {
        if (array)
            outgoing[HEAD_MAX + length++] = i ? ',' : '[';
        length = put(length, &templates[publishes[first + i].template], first + i);
    }
    if (array)
        outgoing[HEAD_MAX + length++] = ']';
    if (redis) {
        finals_missing += count;
        send_bytes(index, outgoing + HEAD_MAX, length);
    } else {
        send_put(index, 1, length);
    }
}

static void note(u32 index, const u8 *payload, u32 length, u8 head, u64 now)
{
    u32 known = intern(payload, length, head);
    if (record_count < RECORDS_MAX)
        records[record_count++] = (struct record){now, index, known};
    else
        overflow++;
}

static void data_frame(u32 index, const u8 *payload, u32 length, u8 head, u32 wire, u64 now)
{
    struct connection *c = &connections[index];
    if (plan.engine_io && length == 1 && payload[0] == '2') {
        outcomes[index].pings++;
        send_frame(index, 1, &(struct text){1, NONE, (const u8 *)"3"}, 0);
        return;
    }
    outcomes[index].frames++;
    outcomes[index].bytes += wire;
    note(index, payload, length, head, now);
    last_data = now;
    if (c->state == OPENING) { /* each answer releases the next message of the script */
        const struct script *script = &scripts[planned[index].script];
        if (c->step < script->count) {
            send_frame(index, 1, &messages[script->messages[c->step++]], 0);
            return;
        }
        c->state = READY;
        outcomes[index].ready = now;
        ready++;
        if (planned[index].flags & STOPS_READING) {
            c->paused = 1;
            watch(index, interest(c));
        }
    } else if (c->final_sent) {
        c->final_sent = 0;
        finals_missing--;
    }
}

/* Handles the whole frames in the buffer; returns the bytes used, or UINT32_MAX if the connection ended.
 * `*want` becomes the length of the unfinished frame at the end, as far as it is known. */
static u32 frames(u32 index, const u8 *buffer, u32 length, u64 now, u32 *want)
{
    u32 at = 0;
    for (;;) {
        const u8 *p = buffer + at;
        u32 left = length - at, head = 2;
        *want = 0;
        if (left < 2)
            return at;
        u64 size = p[1] & 0x7f;
        if (size == 126) {
            head = 4;
            if (left < 4)
                return at;
            size = (u64)p[2] << 8 | p[3];
        } else if (size == 127) {
            head = 10;
            if (left < 10)
                return at;
            size = 0;
            for (int i = 2; i < 10; i++)
                size = size << 8 | p[i];
        }
        u8 opcode = p[0] & 0x0f;
        /* The servers measured here never fragment and must not mask (RFC 6455 section 5.1). */
        if (!(p[0] & 0x80) || (p[1] & 0x80) || size > FRAME_MAX || opcode == 0) {
            end_connection(index, BAD_FRAME, p[0]);
            return UINT32_MAX;
        }
        if (size + head > left) {
            *want = (u32)size + head;
            return at;
        }
        const u8 *payload = p + head;
        if (opcode == 1 || opcode == 2) {
            data_frame(index, payload, (u32)size, p[0], (u32)size + head, now);
        } else if (opcode == 9) {
            outcomes[index].pings++;
            send_frame(index, 10, &(struct text){(u32)size, NONE, payload}, 0);
        } else if (opcode == 8) {
            u32 code = size >= 2 ? (u32)payload[0] << 8 | payload[1] : 1005;
            send_frame(index, 8, &(struct text){size >= 2 ? 2 : 0, NONE, payload}, 0);
            end_connection(index, CLOSED, code);
            return UINT32_MAX;
        }
        if (connections[index].state == GONE)
            return UINT32_MAX;
        at += (u32)size + head;
    }
}

/* The answer to the upgrade; the same return values as frames(). Sec-WebSocket-Accept is not
 * checked: the key is the same in every request, and the conformance tests look at it. */
static u32 upgrade(u32 index, const u8 *buffer, u32 length, u64 now)
{
    const u8 *end = memmem(buffer, length, "\r\n\r\n", 4);
    if (end == NULL)
        return 0;
    if (length < 12 || memcmp(buffer, "HTTP/1.1 101", 12) != 0) {
        end_connection(index, UPGRADE_REFUSED, length < 12 ? 0 : (u32)atoi((const char *)buffer + 9));
        return UINT32_MAX;
    }
    connections[index].state = OPENING;
    outcomes[index].upgraded = now;
    return (u32)(end - buffer) + 4;
}

/* Answers of Redis, one line for each command; the same return values as frames(). Only errors are noted, as
 * payloads with the head 0. */
static u32 answers(u32 index, const u8 *buffer, u32 length, u64 now)
{
    u32 at = 0;
    const u8 *end;
    while ((end = memchr(buffer + at, '\n', length - at)) != NULL) {
        outcomes[index].frames++;
        finals_missing--;
        if (buffer[at] == '-')
            note(index, buffer + at, (u32)(end - buffer) - at, 0, now);
        at = (u32)(end - buffer) + 1;
    }
    outcomes[index].bytes += at;
    return at;
}

static u32 understand(u32 index, const u8 *buffer, u32 length, u64 now, u32 *want)
{
    u32 used = 0;
    *want = 0;
    if (planned[index].flags & SPEAKS_REDIS)
        return answers(index, buffer, length, now);
    if (connections[index].state == UPGRADING) {
        used = upgrade(index, buffer, length, now);
        if (used == 0 || used == UINT32_MAX)
            return used;
    }
    u32 more = frames(index, buffer + used, length - used, now, want);
    return more == UINT32_MAX ? more : used + more;
}

static void keep(struct connection *c, const u8 *bytes, u32 length, u32 want)
{
    u32 size = want > length ? want : length + 512;
    if (c->in_size < size) {
        u8 *larger = malloc(size);
        if (larger == NULL)
            die("out of memory");
        memcpy(larger, bytes, length);
        free(c->in);
        c->in = larger;
        c->in_size = size;
    } else {
        memmove(c->in, bytes, length);
    }
    c->in_used = length;
}

static void readable(u32 index)
{
    struct connection *c = &connections[index];
    int joined = c->in_used > 0;
    u8 *buffer = joined ? c->in : scratch;
    u32 size = joined ? c->in_size : READ_BYTES;
    ssize_t got = recv(c->fd, buffer + c->in_used, size - c->in_used, MSG_DONTWAIT);
    u64 now = clock_ns();
    if (got <= 0) {
        if (got == 0)
            end_connection(index, END_OF_FILE, 0);
        else if (errno != EAGAIN)
            end_connection(index, c->state <= CONNECTING ? CONNECT_FAILED : SOCKET_ERROR, (u32)errno);
        return;
    }
    u32 length = c->in_used + (u32)got, want;
    u32 used = understand(index, buffer, length, now, &want);
    if (used == UINT32_MAX)
        return;
    if (used == length)
        c->in_used = 0;
    else
        keep(c, buffer + used, length - used, want);
}

/* ---- setup ---- */

static void start_connection(u32 index)
{
    const struct plan_connection *p = &planned[index];
    struct connection *c = &connections[index];
    int on = 1;
    outcomes[index].started = clock_ns();
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) {
        end_connection(index, CONNECT_FAILED, (u32)errno);
        return;
    }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (p->receive_buffer)
        setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &p->receive_buffer, sizeof p->receive_buffer);
    /* One address reaches a port from about 28,000 ports; more need more addresses of 127/8. */
    struct sockaddr_in address = {.sin_family = AF_INET};
    if (plan.sources > 1) {
        setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK + index % plan.sources);
        if (bind(c->fd, (struct sockaddr *)&address, sizeof address) < 0) {
            end_connection(index, CONNECT_FAILED, (u32)errno);
            return;
        }
    }
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons((u16)p->port);
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS) {
        end_connection(index, CONNECT_FAILED, (u32)errno);
        return;
    }
    c->state = CONNECTING;
    struct epoll_event event = {.events = EPOLLOUT, .data.u32 = index};
    epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event);
}

static void connected(u32 index)
{
    struct connection *c = &connections[index];
    int problem = 0;
    socklen_t size = sizeof problem;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &problem, &size);
    if (problem) {
        end_connection(index, CONNECT_FAILED, (u32)problem);
        return;
    }
    watch(index, EPOLLIN);
    if (planned[index].flags & SPEAKS_REDIS) {
        c->state = READY;
        outcomes[index].upgraded = outcomes[index].ready = clock_ns();
        ready++;
        return;
    }
    c->state = UPGRADING;
    const struct text *request = &requests[planned[index].request];
    send_bytes(index, request->bytes, request->length);
}

static u64 start_connections(u64 now) /* returns when the next one is due; 0: when something happens */
{
    for (int pass = 0; started < plan.connections; pass++) {
        u64 due = setup_started + started * plan.connect_gap;
        if (due > now)
            return due;
        if (plan.in_flight && started - ready - gone_in_setup >= plan.in_flight)
            return 0;
        if (pass == CONNECTS_PER_PASS)
            return now;
        start_connection(started++);
    }
    return 0;
}

/* ---- publishing ---- */

static u64 publish_due(u64 now) /* returns when the next one is due; 0: all are sent */
{
    while (next_publish < plan.publishes) {
        const struct plan_publish *p = &publishes[next_publish];
        if (start + p->at > now) {
            now = clock_ns();
            if (start + p->at > now)
                return start + p->at;
        }
        u32 count = 1, left = plan.publishes - next_publish;
        while (count < plan.gather && count < left && p[count].at == p->at && p[count].connection == p->connection)
            count++;
        if (connections[p->connection].state == READY) { /* else sent_at stays 0: told as never sent */
            u64 moment = clock_ns();
            for (u32 i = 0; i < count; i++)
                sent_at[next_publish + i] = moment;
            send_publishes(p->connection, next_publish, count);
        }
        next_publish += count;
    }
    return 0;
}

static void send_finals(void)
{
    for (u32 i = 0; i < plan.connections; i++) {
        if (planned[i].final == NONE)
            continue;
        finals_missing++;
        if (connections[i].state != READY)
            continue;
        connections[i].final_sent = 1;
        send_frame(i, 1, &messages[planned[i].final], 0);
    }
}

static void resume_reading(void)
{
    for (u32 i = 0; i < plan.connections; i++) {
        struct connection *c = &connections[i];
        if (c->state != READY || !c->paused)
            continue;
        c->paused = 0;
        resumed++;
        watch(i, interest(c));
    }
}

/* ---- the loop ---- */

static void say(const char *what, u64 a, u64 b)
{
    printf("%s %llu %llu\n", what, (unsigned long long)a, (unsigned long long)b);
    fflush(stdout);
}

static void hear(void)
{
    char line[64];
    ssize_t got = read(0, line, sizeof line - 1);
    if (got == 0) {
        told_end = 1;
        epoll_ctl(poller, EPOLL_CTL_DEL, 0, NULL);
    }
    if (got <= 0)
        return;
    line[got] = 0;
    told_go |= strstr(line, "go") != NULL;
    told_end |= strstr(line, "end") != NULL;
}

static void handle(const struct epoll_event *event)
{
    u32 index = event->data.u32;
    if (index == NONE) {
        hear();
        return;
    }
    struct connection *c = &connections[index];
    if (c->state == CONNECTING) {
        connected(index);
        return;
    }
    if (c->state == GONE)
        return;
    if (event->events & EPOLLOUT)
        flush(index);
    if (c->state != GONE && event->events & (EPOLLIN | EPOLLHUP | EPOLLERR))
        readable(index);
}

static void wait_events(u64 due)
{
    static struct epoll_event events[512];
    u64 now = clock_ns(), limit = now + REPORT_EVERY;
    if (due == 0 || due > limit)
        due = limit;
    u64 left = due > now ? due - now : 0;
    struct timespec timeout = {.tv_sec = (time_t)(left / SECOND), .tv_nsec = (long)(left % SECOND)};
    /* epoll_wait's milliseconds are too coarse for 20,000 publishes a second. */
    long count = syscall(SYS_epoll_pwait2, poller, events, 512, &timeout, NULL, 0);
    if (count < 0 && errno != EINTR)
        die("epoll_pwait2: %s", strerror(errno));
    for (long i = 0; i < count; i++) {
        handle(&events[i]);
        if (phase == PUBLISHING && i % EVENTS_PER_CHECK == EVENTS_PER_CHECK - 1)
            publish_due(clock_ns());
    }
}

static void advance(u64 now) /* from one phase to the next, when it is time */
{
    int late = settling && now > settling + plan.settle_timeout;
    int quiet = pending_out == 0 && finals_missing == 0 && now > last_data + plan.quiet && now > settling + plan.quiet;
    if (phase == SETUP && (ready + gone_in_setup == plan.connections || now > setup_started + plan.setup_timeout)) {
        phase = HELD;
        setup_ended = now;
        say("ready", ready, plan.connections);
    } else if (phase == HELD && told_go) {
        phase = PUBLISHING;
        start = now + plan.lead;
    } else if (phase == PUBLISHING && next_publish == plan.publishes) {
        phase = SETTLING;
        published = settling = now;
        send_finals();
    } else if (phase == SETTLING && (quiet || late)) {
        phase = RESUMED;
        settling = now; /* those that read again get a time of their own */
        resume_reading();
    } else if (phase == RESUMED && (resumed == 0 || quiet || late)) {
        phase = DONE;
        say("done", finals_missing, pending_out);
    }
}

static void report(u64 now)
{
    static u64 next;
    if (now < next)
        return;
    next = now + REPORT_EVERY;
    if (phase == SETUP)
        say("setup", ready, plan.connections);
    else if (phase == PUBLISHING)
        say("publish", next_publish, plan.publishes);
    else if (phase == SETTLING || phase == RESUMED)
        say("settle", record_count, record_count);
}

static void prepare(void)
{
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    if (limit.rlim_cur < plan.connections + 16ull)
        die("%u connections need more descriptors than the %llu granted (ulimit -Hn)", plan.connections,
            (unsigned long long)limit.rlim_cur);
    prctl(PR_SET_TIMERSLACK, 1000ul); /* ns; the default of 50 us would show in every stamp */
    random_state = clock_ns() | 1;
    connections = calloc(plan.connections + 1, sizeof *connections);
    outcomes = calloc(plan.connections + 1, sizeof *outcomes);
    sent_at = calloc(plan.publishes + 1, sizeof *sent_at);
    scratch = malloc(READ_BYTES);
    records = reserve(RECORDS_MAX * sizeof *records);
    payloads = reserve(PAYLOADS_MAX * sizeof *payloads);
    arena = reserve(ARENA_MAX);
    rehash();
    poller = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = NONE};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, 0, &event) < 0)
        die("standard input must be a pipe: %s", strerror(errno));
    for (u32 i = 0; i < plan.connections; i++)
        connections[i].fd = -1;
}

int main(int count, char **arguments)
{
    if (count != 3)
        die("use: load PLAN RECORDING (written and read by python -m bench)");
    read_plan(arguments[1]);
    prepare();
    setup_started = clock_ns();
    while (!told_end) {
        u64 now = clock_ns(), due = 0;
        if (phase == SETUP)
            due = start_connections(now);
        else if (phase == PUBLISHING)
            due = publish_due(now);
        else if (phase == SETTLING || phase == RESUMED)
            due = now + SECOND / 100;
        advance(now);
        report(now);
        wait_events(phase == HELD && told_go ? now : phase == PUBLISHING && due == 0 ? now : due);
    }
    for (u32 i = 0; i < plan.connections; i++)
        if ((connections[i].state == READY || connections[i].state == OPENING) && !(planned[i].flags & SPEAKS_REDIS))
            send_frame(i, 8, &(struct text){2, NONE, (const u8 *)"\x03\xe8"}, 0);
    write_recording(arguments[2]);
    return 0;
}
