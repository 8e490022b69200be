/* Two limits of this machine, each by all threads at once: bytes read per second, int8 operations per second.
 *
 *   probe THREADS [SECONDS]      then, for every line on stdin, one line "GB/s GOPS" on stdout
 *
 * Reading goes over a buffer larger than any cache, by 64-byte loads into sums that nothing waits for.
 * The int8 loop multiplies u8 by s8 into 24 registers and touches no memory: 64 products and sums an
 * instruction, counted as 128 operations. Without AVX512-VNNI five instructions of AVX2 do the same, into 10
 * registers: factors of 6 and 8 bits, whose products are added in 16 bits by four; without AVX2 the second figure is 0.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#define BYTES (512ull << 20)
#define MAX_THREADS 256

typedef long long vector __attribute__((vector_size(64))); /* a cache line, on any machine */

static int threads;
static double limit = 0.12; /* seconds of each measurement */
static char *buffer;
static pthread_barrier_t barrier;
static double rates[2][MAX_THREADS];

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static double read_rate(const char *from, size_t size) {
    double begin = now(), end;
    size_t done = 0;
    const size_t step = 1 << 20; /* between looks at the clock */
    vector a = {0}, b = a, c = a, d = a;
    size_t at = 0;
    do {
        const char *p = from + at;
        for (size_t i = 0; i < step; i += 256) {
            a += *(const vector *)(p + i);
            b += *(const vector *)(p + i + 64);
            c += *(const vector *)(p + i + 128);
            d += *(const vector *)(p + i + 192);
        }
        done += step;
        at = at + 2 * step <= size ? at + step : 0;
        end = now();
    } while (end - begin < limit);
    volatile vector keep = a + b + c + d;
    (void)keep;
    return done / (end - begin);
}

#ifdef __AVX512VNNI__
static double int8_rate(void) {
    double begin = now(), end;
    vector sum[24], x = {1}, y = {2};
#pragma GCC unroll 24
    for (int i = 0; i < 24; i++) sum[i] = (vector){0};
    double done = 0;
    do {
        for (int i = 0; i < 20000; i++) {
#define DOT(k) __asm__ volatile("vpdpbusd %1, %2, %0" : "+v"(sum[k]) : "v"(x), "v"(y));
            DOT(0) DOT(1) DOT(2) DOT(3) DOT(4) DOT(5) DOT(6) DOT(7)
            DOT(8) DOT(9) DOT(10) DOT(11) DOT(12) DOT(13) DOT(14) DOT(15)
            DOT(16) DOT(17) DOT(18) DOT(19) DOT(20) DOT(21) DOT(22) DOT(23)
        }
        done += 20000.0 * 24 * 128;
        end = now();
    } while (end - begin < limit);
    return done / (end - begin);
}
#elif defined(__AVX2__)
typedef long long half_vector __attribute__((vector_size(32)));

static double int8_rate(void) {
    double begin = now(), end;
    half_vector sum[10], low, high, x = {1}, y = {2}, ones = {0x0001000100010001ll};
#pragma GCC unroll 10
    for (int i = 0; i < 10; i++) sum[i] = (half_vector){0};
    double done = 0;
    do {
        for (int i = 0; i < 20000; i++) {
#define DOT(k)                                                                                      \
    __asm__ volatile("vpmaddubsw %4, %3, %1\n\tvpmaddubsw %3, %4, %2\n\tvpaddw %2, %1, %1\n\t"         \
                     "vpmaddwd %5, %1, %1\n\tvpaddd %1, %0, %0"                                     \
                     : "+x"(sum[k]), "=&x"(low), "=&x"(high)                                        \
                     : "x"(x), "x"(y), "x"(ones));
            DOT(0) DOT(1) DOT(2) DOT(3) DOT(4) DOT(5) DOT(6) DOT(7) DOT(8) DOT(9)
        }
        done += 20000.0 * 10 * 128;
        end = now();
    } while (end - begin < limit);
    return done / (end - begin);
}
#else
static double int8_rate(void) { return 0; }
#endif

static void *work(void *argument) {
    long id = (long)argument;
    size_t part = BYTES / threads & ~(size_t)4095;
    for (;;) {
        pthread_barrier_wait(&barrier);
        rates[0][id] = read_rate(buffer + id * part, part);
        pthread_barrier_wait(&barrier);
        rates[1][id] = int8_rate();
        pthread_barrier_wait(&barrier);
    }
    return NULL;
}

int main(int count, char **values) {
    threads = count > 1 ? atoi(values[1]) : 1;
    if (count > 2) limit = atof(values[2]);
    if (threads < 1 || threads > MAX_THREADS) return 1;
    buffer = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (buffer == MAP_FAILED) return 1;
    madvise(buffer, BYTES, MADV_HUGEPAGE);
    for (size_t i = 0; i < BYTES; i += 4096) buffer[i] = (char)i;
    pthread_barrier_init(&barrier, NULL, threads + 1);
    for (long i = 0; i < threads; i++) {
        pthread_t thread;
        pthread_create(&thread, NULL, work, (void *)i);
    }
    for (int c; (c = getchar()) != EOF;) {
        if (c != '\n') continue;
        for (int i = 0; i < 3; i++) pthread_barrier_wait(&barrier);
        double sums[2] = {0, 0};
        for (int i = 0; i < threads; i++) sums[0] += rates[0][i], sums[1] += rates[1][i];
        printf("%.3f %.1f\n", sums[0] / 1e9, sums[1] / 1e9);
        fflush(stdout);
    }
    return 0;
}
