// A CUDA runtime, cuBLAS and NCCL in which device memory is host memory: copies are real, kernels do nothing.
//
// Loaded with LD_PRELOAD in front of PyTorch's own libraries, so that dispatcher, autograd, allocator, streams, events,
// pinned memory and process groups are the real CUDA code. What nothing here defines, `build.py` makes a function that
// returns 0 of. The sections: counters, memory, devices, allocation, copies, streams and events, launches, NCCL, cuBLAS.
//
//   NULLCUDA_DEVICES     how many GPUs there are (1)
//   NULLCUDA_GB          memory of each (80): more is refused, as a real one would
//   NULLCUDA_MAJOR       compute capability (9)
//   NULLCUDA_COPY_BYTES  larger copies are left out
//   NULLCUDA_SHM         1: NCCL's collectives between processes of one machine
//   NULLCUDA_STUCK       file with two numbers, a GPU and a count: after so many timed events of a process that GPU does
//                        nothing any more for that process, which takes the file away: for the next one it is well
//   NULLCUDA_LOG         file for messages (standard error)
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <stdint.h>
#include <pthread.h>
#include <unistd.h>
#include <sys/mman.h>
#include <cuda_runtime_api.h>
#include <nccl.h>

// What is counted; `idle.py` has the same names in the same order.
// clang-format off
enum {
    LAUNCH, GEMM, COPY_H2D, COPY_H2D_PINNED, COPY_D2H, COPY_D2H_PINNED, COPY_D2D, COPY_SYNC, MEMSET,
    STREAM_SYNC, EVENT_SYNC, DEVICE_SYNC, MALLOC, FREE, HOST_ALLOC, COLLECTIVE, EVENT_RECORD, STREAM_WAIT,
    BYTES_H2D, BYTES_D2H, BYTES_D2D, NOW, PEAK, HOST_NOW, HOST_PEAK, COUNTERS
};
// clang-format on
static long counts[COUNTERS];
long *nullcuda_counts(void) { return counts; }
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
// Called at each event whose bit is set in `wanted`: who waits for the GPU, line by line.
static void (*callback)(int, long);
static long wanted;
void nullcuda_callback(void (*f)(int, long), long mask) {
    wanted = f ? mask : 0;
    callback = f;
}
static void add(int which, long n) {
    __atomic_add_fetch(&counts[which], n, __ATOMIC_RELAXED);
    if (wanted >> which & 1) callback(which, n);
}
// Where messages go.
static FILE *out_(void) {
    static FILE *f;
    if (!f) {
        const char *name = getenv("NULLCUDA_LOG");
        f = name ? fopen(name, "a") : stderr;
        setvbuf(f, 0, _IOLBF, 0);
    }
    return f;
}
#define ADD(which, n) add(which, (long)(n))

static long env(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text ? atol(text) : otherwise;
}
// Read once: the environment of a process does not change.
static int devices(void) {
    static int found = -1;
    if (found < 0) found = (int)env("NULLCUDA_DEVICES", 1);
    return found;
}
static size_t total(void) {
    static size_t found;
    if (!found) found = (size_t)env("NULLCUDA_GB", 80) << 30;
    return found;
}
static size_t copied(void) {
    static size_t found;
    if (!found) found = (size_t)env("NULLCUDA_COPY_BYTES", 1L << 40);
    return found;
}

// ---- memory: every range that is not plain host memory. `kind` 1: page-locked, 2: on a device ----
typedef struct Range {
    char *start;
    size_t size;
    int kind, device;
    struct Range *next;
} Range;
static Range *ranges;
static void note(void *start, size_t size, int kind, int device) {
    Range *one = malloc(sizeof *one);
    *one = (Range){start, size, kind, device, 0};
    pthread_mutex_lock(&lock);
    one->next = ranges;
    ranges = one;
    int now = kind == 2 ? NOW : HOST_NOW, peak = kind == 2 ? PEAK : HOST_PEAK;
    counts[now] += size;
    if (counts[now] > counts[peak]) counts[peak] = counts[now];
    pthread_mutex_unlock(&lock);
}
static size_t forget(void *start) {
    size_t size = 0;
    pthread_mutex_lock(&lock);
    for (Range **at = &ranges; *at; at = &(*at)->next)
        if ((*at)->start == start) {
            Range *one = *at;
            size = one->size;
            counts[one->kind == 2 ? NOW : HOST_NOW] -= size;
            *at = one->next;
            free(one);
            break;
        }
    pthread_mutex_unlock(&lock);
    return size;
}
static Range find(const void *at) {
    Range found = {0};
    pthread_mutex_lock(&lock);
    for (Range *one = ranges; one; one = one->next)
        if ((char *)at >= one->start && (char *)at < one->start + one->size) {
            found = *one;
            break;
        }
    pthread_mutex_unlock(&lock);
    return found;
}

// ---- devices ----
// Each thread has its own device and its own last error, as in CUDA.
static __thread int current;
static __thread cudaError_t last;
#define OK return cudaSuccess
// The number of this thread's device among all of the machine: what CUDA_VISIBLE_DEVICES says.
static int number(void) {
    const char *seen = getenv("CUDA_VISIBLE_DEVICES");
    char text[256], *save;
    snprintf(text, sizeof text, "%s", seen ? seen : "0,1,2,3,4,5,6,7");
    char *word = strtok_r(text, ",", &save);
    for (int i = 0; i < current && word; i++) word = strtok_r(0, ",", &save);
    return word ? atoi(word) : current;
}
cudaError_t cudaGetDeviceCount(int *count) {
    *count = devices();
    if (!devices()) return cudaErrorNoDevice;
    OK;
}
cudaError_t cudaGetDevice(int *device) {
    *device = current;
    OK;
}
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= devices()) return last = cudaErrorInvalidDevice;
    current = device;
    OK;
}
cudaError_t cudaGetLastError(void) {
    cudaError_t found = last;
    last = 0;
    return found;
}
cudaError_t cudaPeekAtLastError(void) { return last; }
const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : "null cuda error";
}
const char *cudaGetErrorName(cudaError_t error) { return "nullCudaError"; }
cudaError_t cudaDriverGetVersion(int *version) {
    *version = 13020;
    OK;
}
cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = 13020;
    OK;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "Null H100");
    p->totalGlobalMem = total();
    p->sharedMemPerBlock = 49152;
    p->regsPerBlock = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->major = (int)env("NULLCUDA_MAJOR", 9);
    p->minor = 0;
    p->multiProcessorCount = 132;
    p->maxThreadsPerMultiProcessor = 2048;
    p->sharedMemPerMultiprocessor = 233472;
    p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlockOptin = 232448;
    p->l2CacheSize = 50 << 20;
    p->maxBlocksPerMultiProcessor = 32;
    p->unifiedAddressing = 1;
    p->concurrentKernels = 1;
    p->pciBusID = device + 1;
    p->memoryBusWidth = 5120;
    p->totalConstMem = 65536;
    p->canMapHostMemory = 1;
    p->asyncEngineCount = 3;
    p->reservedSharedMemPerBlock = 1024;
    p->memoryPoolsSupported = 1;
    OK;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr what, int device) {
    struct cudaDeviceProp p;
    cudaGetDeviceProperties(&p, device);
    switch (what) {
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: *value = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *value = 64; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 233472; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = 65536; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = 1024; break;
    default: *value = 0;
    }
    OK;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) {
    *can = 1;
    OK;
}
cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int device) {
    snprintf(text, size, "0000:%02x:00.0", device + 1);
    OK;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    OK;
}
cudaError_t cudaMemGetInfo(size_t *free_, size_t *all) {
    *all = total();
    *free_ = total() - counts[NOW];
    OK;
}

// ---- allocation: whole pages, taken up only when written to ----
cudaError_t cudaMalloc(void **at, size_t size) {
    ADD(MALLOC, 1);
    if (!size) {
        *at = 0;
        OK;
    }
    if (counts[NOW] + (long)size > (long)total()) {
        *at = 0;
        return last = cudaErrorMemoryAllocation;
    }
    size = (size + 4095) & ~4095UL;
    void *found = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return last = cudaErrorMemoryAllocation;
    note(found, size, 2, current);
    *at = found;
    OK;
}
cudaError_t cudaMallocAsync(void **at, size_t size, cudaStream_t s) { return cudaMalloc(at, size); }
cudaError_t cudaMallocManaged(void **at, size_t size, unsigned f) { return cudaMalloc(at, size); }
cudaError_t cudaFree(void *at) {
    ADD(FREE, 1);
    if (at) {
        size_t size = forget(at);
        if (size) munmap(at, size);
    }
    OK;
}
cudaError_t cudaFreeAsync(void *at, cudaStream_t s) { return cudaFree(at); }
cudaError_t cudaHostAlloc(void **at, size_t size, unsigned f) {
    ADD(HOST_ALLOC, 1);
    size = (size + 4095) & ~4095UL;
    *at = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    note(*at, size, 1, 0);
    OK;
}
cudaError_t cudaMallocHost(void **at, size_t size) { return cudaHostAlloc(at, size, 0); }
cudaError_t cudaFreeHost(void *at) {
    size_t size = forget(at);
    if (size) munmap(at, size);
    OK;
}
cudaError_t cudaHostRegister(void *at, size_t size, unsigned f) {
    note(at, size, 1, 0);
    OK;
}
cudaError_t cudaHostUnregister(void *at) {
    forget(at);
    OK;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *at) {
    Range r = find(at);
    memset(a, 0, sizeof *a);
    a->type = r.kind == 2 ? cudaMemoryTypeDevice : r.kind == 1 ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    a->device = r.device;
    if (r.kind) {
        a->devicePointer = (void *)at;
        a->hostPointer = (void *)at;
    }
    OK;
}

// ---- a GPU that is stuck: what it is given from then on is never done, and who waits for it waits for ever ----
static volatile int stuck;
static void wait_(void) {
    while (stuck) pause();
}
// At each timed event; PyTorch's own are not.
static void timed(void) {
    static int count;
    const char *name = getenv("NULLCUDA_STUCK");
    if (!name) return;
    int so_far = __atomic_add_fetch(&count, 1, __ATOMIC_RELAXED), which, most;
    FILE *f = stuck ? 0 : fopen(name, "r");
    if (!f) return;
    int read = fscanf(f, "%d %d", &which, &most);
    fclose(f);
    if (read == 2 && which == number() && so_far >= most && !unlink(name)) {
        stuck = 1;
        fprintf(out_(), "NULLCUDA: GPU %d is stuck after %d timed events\n", which, so_far);
    }
}

// ---- copies ----
static void move(void *to, const void *from, size_t size) {
    Range t = find(to), f = find(from);
    if (t.kind == 2 && f.kind != 2) {
        ADD(COPY_H2D, 1);
        if (f.kind == 1) ADD(COPY_H2D_PINNED, 1);
        ADD(BYTES_H2D, size);
    } else if (t.kind != 2 && f.kind == 2) {
        ADD(COPY_D2H, 1);
        if (t.kind == 1) ADD(COPY_D2H_PINNED, 1);
        ADD(BYTES_D2H, size);
    } else {
        ADD(COPY_D2D, 1);
        ADD(BYTES_D2D, size);
    }
    if (size <= copied()) memmove(to, from, size);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind k, cudaStream_t s) {
    move(to, from, size);
    OK;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind k) {
    ADD(COPY_SYNC, 1);
    wait_();
    move(to, from, size);
    OK;
}
cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t size, cudaStream_t s) {
    move(to, from, size);
    OK;
}
cudaError_t cudaMemset(void *at, int value, size_t size) {
    ADD(MEMSET, 1);
    if (size <= copied()) memset(at, value, size);
    OK;
}
cudaError_t cudaMemsetAsync(void *at, int value, size_t size, cudaStream_t s) { return cudaMemset(at, value, size); }

// ---- streams and events: everything is done when it is asked for, so nobody ever waits, but for a GPU that is stuck ----
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int p) {
    *s = malloc(8);
    OK;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) {
    *s = malloc(8);
    OK;
}
cudaError_t cudaStreamCreate(cudaStream_t *s) {
    *s = malloc(8);
    OK;
}
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) {
    *p = 0;
    OK;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    ADD(STREAM_SYNC, 1);
    wait_();
    OK;
}
cudaError_t cudaDeviceSynchronize(void) {
    ADD(DEVICE_SYNC, 1);
    wait_();
    OK;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned f) {
    ADD(STREAM_WAIT, 1);
    OK;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    OK;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *g, const cudaGraphNode_t **d, const cudaGraphEdgeData **e,
                                     size_t *n) {
    *status = cudaStreamCaptureStatusNone;
    if (id) *id = 0;
    OK;
}
typedef struct {
    int timed, never;
} Event;
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) {
    Event *one = calloc(1, sizeof *one);
    one->timed = !(f & cudaEventDisableTiming);
    *e = (cudaEvent_t)one;
    OK;
}
cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, cudaEventDefault); }
cudaError_t cudaEventDestroy(cudaEvent_t e) {
    free(e);
    OK;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned f) {
    Event *one = (Event *)e;
    ADD(EVENT_RECORD, 1);
    one->never = stuck;
    if (one->timed) timed();
    OK;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return cudaEventRecordWithFlags(e, s, 0); }
cudaError_t cudaEventQuery(cudaEvent_t e) {
    if (((Event *)e)->never) return last = cudaErrorNotReady;
    OK;
}
cudaError_t cudaStreamQuery(cudaStream_t s) {
    if (stuck) return last = cudaErrorNotReady;
    OK;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    ADD(EVENT_SYNC, 1);
    if (((Event *)e)->never) wait_();
    OK;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
    *ms = 1;
    OK;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **at, unsigned v, unsigned long long f,
                                             enum cudaDriverEntryPointQueryResult *r) {
    *at = 0;
    if (r) *r = cudaDriverEntryPointSymbolNotFound;
    OK;
}
cudaError_t cudaGetSymbolAddress(void **at, const void *symbol) {
    static char room[1 << 20];
    *at = room;
    OK;
}

// ---- launches ----
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->ptxVersion = a->binaryVersion = 90;
    a->maxDynamicSharedSizeBytes = 232448;
    OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *f, int size, size_t shared) {
    *blocks = 2;
    OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *f, int size, size_t shared,
                                                                   unsigned flags) {
    *blocks = 2;
    OK;
}
cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t s, cudaStream_t st) {
    ADD(LAUNCH, 1);
    OK;
}
cudaError_t __cudaLaunchKernel(void *f, dim3 g, dim3 b, void **a, size_t s, cudaStream_t st) {
    ADD(LAUNCH, 1);
    OK;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) {
    ADD(LAUNCH, 1);
    OK;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *data) {
    f(data);
    OK;
}
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void *data, unsigned flags) {
    f(s, cudaSuccess, data);
    OK;
}
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t s, void *st) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3 *g, dim3 *b, size_t *s, void *st) { OK; }
cudaError_t __cudaGetKernel(void **k, const void *f) {
    *k = (void *)f;
    OK;
}
static void *handle[8];
void **__cudaRegisterFatBinary(void *f) { return handle; }
void __cudaRegisterFatBinaryEnd(void **h) {}
void __cudaUnregisterFatBinary(void **h) {}
void __cudaRegisterFunction(void **h, const char *a, char *b, const char *c, int d, void *e, void *f, void *g, void *i,
                            int *j) {}
void __cudaRegisterVar(void **h, char *a, char *b, const char *c, int d, size_t e, int f, int g) {}

// ---- NCCL. Alone in a process of a larger world: every rank is taken to hold what this one holds. With
// NULLCUDA_SHM=1: real processes of one machine meet in shared memory; a collective returns when all have come (NCCL's
// would at the next wait).
#include <fcntl.h>
#include <sched.h>
#include <time.h>
#define SLOT (8L << 20)
#define MOST 16
typedef struct {
    volatile int come, left;
    volatile int devices[MOST];
    volatile long turn[MOST];
    volatile int aborted;
} Board;
struct ncclComm {
    int size, rank;
    Board *board;
    char *slots;
    long turn;
};
static int shared(void) {
    static int found = -1;
    if (found < 0) found = (int)env("NULLCUDA_SHM", 0);
    return found;
}
static const size_t widths[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
// Returns when all ranks have come here equally often; 1: one of them gave up.
static int meet(ncclComm_t c) {
    long mine = ++c->turn;
    __atomic_store_n(&c->board->turn[c->rank], mine, __ATOMIC_RELEASE);
    for (int r = 0; r < c->size; r++)
        while (__atomic_load_n(&c->board->turn[r], __ATOMIC_ACQUIRE) < mine) {
            if (c->board->aborted) return 1;
            struct timespec t = {0, 50000};
            nanosleep(&t, 0);
        }
    return 0;
}
ncclResult_t ncclGetVersion(int *v) {
    *v = 23007;
    return 0;
}
ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    memset(id, 7, sizeof *id);
    int f = open("/dev/urandom", 0);
    unsigned long r;
    read(f, &r, 8);
    close(f);
    snprintf(id->internal, 100, "/dev/shm/nullnccl_%lx", r);
    return 0;
}
ncclResult_t ncclCommInitRank(ncclComm_t *out, int n, ncclUniqueId id, int r) {
    ncclComm_t c = calloc(1, sizeof *c);
    c->size = n;
    c->rank = r;
    *out = c;
    if (!shared() || n < 2) return 0;
    size_t size = 65536 + (size_t)n * SLOT;
    int f = open(id.internal, O_RDWR | O_CREAT, 0600);
    ftruncate(f, size);
    char *at = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, f, 0);
    close(f);
    c->board = (Board *)at;
    c->slots = at + 65536;
    const char *seen = getenv("CUDA_VISIBLE_DEVICES");
    c->board->devices[r] = 1 + number();
    fprintf(out_(), "NULLNCCL rank %d of %d, device index %d of CUDA_VISIBLE_DEVICES=%s\n", r, n, current,
            seen ? seen : "-");
    if (meet(c)) return ncclInternalError;
    for (int a = 0; a < n; a++)
        for (int b = a + 1; b < n; b++)
            if (c->board->devices[a] == c->board->devices[b]) {
                fprintf(out_(), "NULLNCCL Duplicate GPU detected: ranks %d and %d\n", a, b);
                return ncclInvalidUsage;
            }
    if (meet(c)) return ncclInternalError;
    unlink(id.internal);
    return 0;
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t *c, int n, ncclUniqueId id, int r, ncclConfig_t *f) {
    return ncclCommInitRank(c, n, id, r);
}
ncclResult_t ncclCommInitRankScalable(ncclComm_t *c, int n, int r, int k, ncclUniqueId *id, ncclConfig_t *f) {
    return ncclCommInitRank(c, n, *id, r);
}
ncclResult_t ncclCommSplit(ncclComm_t o, int color, int key, ncclComm_t *c, ncclConfig_t *f) { // all ranks, one colour
    if (!o->board) {
        *c = malloc(sizeof **c);
        **c = *o;
        return 0;
    }
    ncclUniqueId id;
    if (o->rank == 0) {
        ncclGetUniqueId(&id);
        memcpy(o->slots, &id, sizeof id);
    }
    if (meet(o)) return ncclInternalError;
    memcpy(&id, o->slots, sizeof id);
    if (meet(o)) return ncclInternalError;
    return ncclCommInitRank(c, o->size, id, o->rank);
}
ncclResult_t ncclCommCount(const ncclComm_t c, int *n) {
    *n = c->size;
    return 0;
}
ncclResult_t ncclCommUserRank(const ncclComm_t c, int *r) {
    *r = c->rank;
    return 0;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *r) {
    *r = 0;
    return 0;
}
ncclResult_t ncclCommAbort(ncclComm_t c) {
    if (c->board) c->board->aborted = 1;
    return 0;
}
const char *ncclGetErrorString(ncclResult_t r) { return r == ncclInvalidUsage ? "invalid usage" : "null nccl"; }
const char *ncclGetLastError(ncclComm_t c) { return ""; }
static const char *foreign(const void *at) { return find(at).kind == 2 ? 0 : "host memory in a collective"; }
#define DEVICE(at, n)                                                                                                  \
    if ((n) && foreign(at)) {                                                                                          \
        fprintf(out_(), "NULLCUDA: %s\n", foreign(at));                                                                \
        return ncclInvalidArgument;                                                                                    \
    }
// clang-format off
#define EACH(T, E) { T *y = to; const T *x = from; for (size_t i = 0; i < n; i++) { E } } break;
#define FOLD(T)                                                                                                        \
    EACH(T, if (op == ncclSum || op > ncclAvg) y[i] += x[i];                                                           \
            else if (op == ncclMax) y[i] = y[i] > x[i] ? y[i] : x[i];                                                  \
            else if (op == ncclMin) y[i] = y[i] < x[i] ? y[i] : x[i];)
// Adds (or whatever `op` says) another rank's values to those in `to`.
static void fold(void *to, const void *from, size_t n, ncclDataType_t t, ncclRedOp_t op) {
    switch ((int)t) {
    case ncclFloat32: FOLD(float)
    case ncclFloat64: FOLD(double)
    case ncclInt64: FOLD(int64_t)
    case ncclInt32: FOLD(int32_t)
    case ncclUint8: FOLD(uint8_t)
    case ncclInt8: FOLD(int8_t)
    default: fprintf(out_(), "NULLNCCL: no sums of type %d\n", t);
    }
}
// clang-format on
// A sum where every rank is taken to hold what this one holds.
static void many(void *at, size_t n, ncclDataType_t t, ncclRedOp_t op, int size) {
    if (op != ncclSum || size < 2 || n * widths[t] > copied()) return;
    if (t == ncclFloat32)
        for (size_t i = 0; i < n; i++) ((float *)at)[i] *= size;
    if (t == ncclFloat64)
        for (size_t i = 0; i < n; i++) ((double *)at)[i] *= size;
    if (t == ncclInt64)
        for (size_t i = 0; i < n; i++) ((int64_t *)at)[i] *= size;
}
// Piece by piece: everyone shows its input, then takes what it wants
typedef void (*Take)(ncclComm_t c, char *to, size_t at, size_t bytes, ncclDataType_t t, ncclRedOp_t op, size_t stride,
                     int root);
static ncclResult_t together(ncclComm_t c, const char *from, char *to, size_t bytes, ncclDataType_t t, ncclRedOp_t op,
                             size_t stride, int root, Take take) {
    for (size_t at = 0; at < bytes || !bytes; at += SLOT) {
        size_t now = bytes - at < SLOT ? bytes - at : SLOT;
        memcpy(c->slots + c->rank * SLOT, from + at, now);
        if (meet(c)) return ncclRemoteError;
        take(c, to, at, now, t, op, stride, root);
        if (meet(c)) return ncclRemoteError;
        if (!bytes) break;
    }
    return 0;
}
static void take_sum(ncclComm_t c, char *to, size_t at, size_t b, ncclDataType_t t, ncclRedOp_t op, size_t s,
                     int root) {
    memcpy(to + at, c->slots, b);
    for (int r = 1; r < c->size; r++) fold(to + at, c->slots + r * SLOT, b / widths[t], t, op);
}
static void take_all(ncclComm_t c, char *to, size_t at, size_t b, ncclDataType_t t, ncclRedOp_t op, size_t s,
                     int root) {
    for (int r = 0; r < c->size; r++) memcpy(to + r * s + at, c->slots + r * SLOT, b);
}
static void take_root(ncclComm_t c, char *to, size_t at, size_t b, ncclDataType_t t, ncclRedOp_t op, size_t s,
                      int root) {
    memcpy(to + at, c->slots + root * SLOT, b);
}
ncclResult_t ncclAllReduce(const void *from, void *to, size_t n, ncclDataType_t t, ncclRedOp_t op, ncclComm_t c,
                           cudaStream_t s) {
    ADD(COLLECTIVE, 1);
    if (stuck) return 0; // launched, and no more
    DEVICE(from, n);
    DEVICE(to, n);
    size_t b = n * widths[t];
    if (c->board) return together(c, from, to, b, t, op, 0, 0, take_sum);
    if (b <= copied()) {
        if (from != to) memmove(to, from, b);
        many(to, n, t, op, c->size);
    }
    return 0;
}
ncclResult_t ncclReduce(const void *from, void *to, size_t n, ncclDataType_t t, ncclRedOp_t op, int root, ncclComm_t c,
                        cudaStream_t s) {
    if (c->board && c->rank != root && !to && !stuck) {
        char *room = malloc(n * widths[t] + 1);
        ncclResult_t r = together(c, from, room, n * widths[t], t, op, 0, 0, take_sum);
        free(room);
        ADD(COLLECTIVE, 1);
        return r;
    }
    return ncclAllReduce(from, to, n, t, op, c, s);
}
ncclResult_t ncclBroadcast(const void *from, void *to, size_t n, ncclDataType_t t, int root, ncclComm_t c,
                           cudaStream_t s) {
    ADD(COLLECTIVE, 1);
    if (stuck) return 0; // launched, and no more
    DEVICE(to, n);
    if (c->board) return together(c, from ? from : to, to, n * widths[t], t, 0, 0, root, take_root);
    if (from != to && n * widths[t] <= copied()) memmove(to, from, n * widths[t]);
    return 0;
}
ncclResult_t ncclBcast(void *at, size_t n, ncclDataType_t t, int root, ncclComm_t c, cudaStream_t s) {
    return ncclBroadcast(at, at, n, t, root, c, s);
}
ncclResult_t ncclAllGather(const void *from, void *to, size_t n, ncclDataType_t t, ncclComm_t c, cudaStream_t s) {
    ADD(COLLECTIVE, 1);
    if (stuck) return 0; // launched, and no more
    DEVICE(from, n);
    DEVICE(to, n);
    size_t b = n * widths[t];
    if (c->board) return together(c, from, to, b, t, 0, b, 0, take_all);
    if (b <= copied())
        for (int r = 0; r < c->size; r++) memmove((char *)to + r * b, from, b);
    return 0;
}
ncclResult_t ncclReduceScatter(const void *from, void *to, size_t n, ncclDataType_t t, ncclRedOp_t op, ncclComm_t c,
                               cudaStream_t s) {
    ADD(COLLECTIVE, 1);
    if (stuck) return 0; // launched, and no more
    DEVICE(from, n);
    DEVICE(to, n);
    size_t b = n * widths[t];
    if (c->board) {
        char *room = malloc(b * c->size + 1);
        ncclResult_t r = together(c, from, room, b * c->size, t, op, 0, 0, take_sum);
        memcpy(to, room + c->rank * b, b);
        free(room);
        return r;
    }
    if (b <= copied()) {
        memmove(to, (char *)from + c->rank * b, b);
        many(to, n, t, op, c->size);
    }
    return 0;
}
ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t *op, void *scalar, ncclDataType_t t, ncclScalarResidence_t r,
                                      ncclComm_t c) {
    *op = ncclSum;
    return 0;
}

// ---- cuBLAS ----
int cublasCreate_v2(void **h) {
    *h = malloc(64);
    return 0;
}
int cublasGetMathMode(void *h, int *m) {
    *m = 0;
    return 0;
}
int cublasGetPointerMode_v2(void *h, int *m) {
    *m = 0;
    return 0;
}
// clang-format off
#define GEMM_(name) int name() { ADD(GEMM, 1); return 0; }
GEMM_(cublasSgemm_v2)
GEMM_(cublasDgemm_v2)
GEMM_(cublasGemmEx)
GEMM_(cublasSgemmEx)
GEMM_(cublasGemmStridedBatchedEx)
GEMM_(cublasSgemmStridedBatched)
GEMM_(cublasDgemmStridedBatched)
GEMM_(cublasLtMatmul)
// clang-format on
int cublasLtMatmulDescCreate(void **d, int a, int b) {
    *d = malloc(256);
    return 0;
}
int cublasLtMatrixLayoutCreate(void **d, int a, uint64_t r, uint64_t c, int64_t l) {
    *d = malloc(256);
    return 0;
}
int cublasLtMatmulPreferenceCreate(void **d) {
    *d = malloc(256);
    return 0;
}
int cublasLtMatmulAlgoGetHeuristic(void *h, void *d, void *a, void *b, void *c, void *e, void *p, int wanted,
                                   void *results, int *found) {
    memset(results, 0, 64);
    *found = 1;
    return 0;
}
