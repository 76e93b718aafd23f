/* The CUDA driver as Triton's launcher calls it, without a GPU: every call is checked by the driver's documented rules,
   launches are counted, nothing runs. What breaks a rule returns an error, and cuGetErrorString is the rule.

   Rules: the CUDA driver API (cuTensorMapEncodeTiled, cuLaunchKernelEx, cuFuncSetAttribute) and the table of compute
   capabilities in the CUDA programming guide. */

#include <cuda.h>
#include <elf.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Shared memory of a block and of a multiprocessor in KiB, multiprocessors. */
static const struct device {
    int capability;
    unsigned block_kib, multiprocessor_kib, multiprocessors;
} DEVICES[] = {{80, 163, 164, 108}, {90, 227, 228, 132}, {100, 227, 228, 148}, {120, 99, 100, 188}};
static const struct device *device = &DEVICES[1];

struct function {
    char name[256];
    unsigned registers, frame, shared; /* a thread's, a thread's bytes on the stack, a block's fixed bytes */
    unsigned threads[3];               /* that it was compiled for; 0: any */
    unsigned dynamic;                  /* shared bytes that it may ask for */
    unsigned parameters, sizes[512];
};

/* What went wrong last, and every launch since they were last asked for. */
static _Thread_local char message[600] = "no error";
static char launches[1 << 20], refused[64];
static size_t written;

static CUresult wrong(CUresult code, const char *rule, ...) {
    va_list values;
    va_start(values, rule);
    vsnprintf(message, sizeof message, rule, values);
    va_end(values);
    return code;
}
#define REQUIRE(holds, ...) \
    do { \
        if (!(holds)) return wrong(CUDA_ERROR_INVALID_VALUE, __VA_ARGS__); \
    } while (0)

/* For the tests ---------------------------------------------------------------------------------------------------- */

int stub_be(int capability) {
    for (size_t i = 0; i < sizeof DEVICES / sizeof *DEVICES; i++)
        if (DEVICES[i].capability == capability) return device = &DEVICES[i], 1;
    return 0;
}

int stub_multiprocessors(void) { return device->multiprocessors; }

/* The driver's function that fails from now on, or "". */
void stub_refuse(const char *name) { snprintf(refused, sizeof refused, "%s", name); }

/* A line for each launch, "name grid x y z block x y z shared bytes", and forgets them. */
const char *stub_launches(void) {
    static char taken[sizeof launches];
    memcpy(taken, launches, written);
    taken[written] = '\0';
    written = 0;
    return taken;
}

#define MAY_REFUSE() \
    if (!strcmp(refused, __func__)) \
    return wrong(CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device")

/* Devices and contexts --------------------------------------------------------------------------------------------- */

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult code, const char **text) { return *text = message, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *found, int ordinal) {
    REQUIRE(ordinal == 0, "there is one device, got %d", ordinal);
    return *found = 0, CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice of) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = device->block_kib << 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = device->multiprocessor_kib << 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = device->multiprocessors; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = device->capability / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = device->capability % 10; break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 1000000; break;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 5120; break;
    default: return wrong(CUDA_ERROR_NOT_SUPPORTED, "tests/launch/libcuda.c knows no device attribute %d", attribute);
    }
    return CUDA_SUCCESS;
}

static CUcontext current;
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice of) {
    return *context = (CUcontext)&current, CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = current, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return current = context, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *found) { return *found = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 1 << 20, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}

/* tests/launch/device.py marks the addresses of a device's tensors by this bit. */
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    REQUIRE(pointer >> 60 & 1, "0x%llx is no address of the device", (unsigned long long)pointer);
    return *(CUdeviceptr *)data = pointer, CUDA_SUCCESS;
}

/* Modules: the cubin's own word on what it is for and what it takes ------------------------------------------------- */

/* Attributes of .nv.info sections, as cuobjdump -elf names them. */
enum { REQNTID = 0x10, FRAME_SIZE = 0x11, KPARAM_INFO = 0x17, REGCOUNT = 0x2f };

static const Elf64_Shdr *section(const char *image, int index) {
    const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
    return (const Elf64_Shdr *)(image + header->e_shoff) + index;
}

static void read_info(struct function *function, const char *info, const char *end) {
    while (info < end) {
        unsigned char format = info[0], attribute = info[1];
        uint16_t size;
        memcpy(&size, info + 2, 2);
        info += 4;
        if (format != 4) continue; /* the value is the size */
        uint32_t word[3] = {0};
        memcpy(word, info, size < sizeof word ? size : sizeof word);
        info += size;
        if (attribute == REGCOUNT) function->registers = word[1];
        if (attribute == FRAME_SIZE) function->frame = word[1];
        if (attribute == REQNTID) memcpy(function->threads, word, sizeof word);
        unsigned ordinal = word[1] & 0xffff;
        if (attribute == KPARAM_INFO && ordinal < 512) {
            function->sizes[ordinal] = word[2] >> 18;
            if (ordinal >= function->parameters) function->parameters = ordinal + 1;
        }
    }
}

CUresult cuModuleLoadData(CUmodule *module, const void *data) {
    MAY_REFUSE();
    const char *image = data;
    const Elf64_Ehdr *header = data;
    struct function *function = calloc(1, sizeof *function);
    *module = (CUmodule)function;
    if (sscanf(image, "no cubin of %255s", function->name) == 1) return CUDA_SUCCESS; /* device.py, front_end_only */
    REQUIRE(!memcmp(image, ELFMAG, SELFMAG), "a module must be a cubin");
    int newer = header->e_ident[EI_ABIVERSION] >= 8, built = (newer ? header->e_flags >> 8 : header->e_flags) & 0xff;
    REQUIRE(built == device->capability, "the cubin is for sm_%d, the device is sm_%d", built, device->capability);
    const char *names = image + section(image, header->e_shstrndx)->sh_offset;
    for (int i = 0; i < header->e_shnum; i++) {
        const Elf64_Shdr *part = section(image, i);
        const char *name = names + part->sh_name, *content = image + part->sh_offset;
        if (!strncmp(name, ".nv.info", 8)) read_info(function, content, content + part->sh_size);
        if (!strncmp(name, ".nv.shared.", 11) && strcmp(name + 11, "reserved.0")) function->shared += part->sh_size;
        if (!strncmp(name, ".text.", 6)) snprintf(function->name, sizeof function->name, "%s", name + 6);
    }
    return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *found, CUmodule module, const char *name) {
    struct function *function = (struct function *)module;
    REQUIRE(!strcmp(name, function->name), "the module holds %s, not %s", function->name, name);
    return *found = (CUfunction)function, CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction of) {
    struct function *function = (struct function *)of;
    switch (attribute) {
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = function->registers; break;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = function->frame; break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = function->shared; break;
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = function->threads[0] ? function->threads[0] : 1024; break;
    default: return wrong(CUDA_ERROR_NOT_SUPPORTED, "tests/launch/libcuda.c knows no attribute %d", attribute);
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction of, CUfunction_attribute attribute, int value) {
    struct function *function = (struct function *)of;
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        int limit = (int)device->block_kib << 10;
        REQUIRE(value >= 0 && value + (int)function->shared <= limit,
                "%s: %d bytes of shared memory and %u fixed ones, sm_%d gives a block %d", function->name, value,
                function->shared, device->capability, limit);
        function->dynamic = value;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction of, CUfunc_cache config) { return CUDA_SUCCESS; }

/* Tensor maps ------------------------------------------------------------------------------------------------------- */

static const uint64_t ENCODED = 0x70616d20726f736e; /* the first word of a map that was made here */

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    static const unsigned SIZES[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
    static const unsigned SPANS[] = {0, 32, 64, 128, 128, 128, 128};
#define MAP(holds, rule, ...) REQUIRE(holds, "cuTensorMapEncodeTiled: " rule, __VA_ARGS__)
    MAP((uintptr_t)map % 64 == 0, "the map must lie on 64 bytes, lies at %p", (void *)map);
    MAP((unsigned)type < sizeof SIZES / sizeof *SIZES, "unknown data type %d", type);
    MAP(rank >= 1 && rank <= 5, "tensorRank must be 1 to 5, got %u", rank);
    MAP(interleave == CU_TENSOR_MAP_INTERLEAVE_NONE || rank >= 3, "interleaved tensors have 3 dimensions, got %u", rank);
    MAP((unsigned)swizzle < sizeof SPANS / sizeof *SPANS, "unknown swizzle %d", swizzle);
    unsigned size = SIZES[type], alignment = interleave == CU_TENSOR_MAP_INTERLEAVE_32B ? 32 : 16;
    MAP((uintptr_t)address >> 60 & 1, "%p is no address of the device", address);
    MAP((uintptr_t)address % alignment == 0, "globalAddress must be a multiple of %u, got %p", alignment, address);
    uint64_t extent = size;
    for (unsigned i = 0; i < rank; i++) {
        MAP(dims[i] >= 1 && dims[i] <= 1ull << 32, "globalDim[%u] must be 1 to 2^32, got %llu", i,
            (unsigned long long)dims[i]);
        MAP(box[i] >= 1 && box[i] <= 256, "boxDim[%u] must be 1 to 256, got %u", i, box[i]);
        MAP(steps[i] >= 1 && steps[i] <= 8, "elementStrides[%u] must be 1 to 8, got %u", i, steps[i]);
        extent *= dims[i];
        if (i + 1 == rank) break;
        unsigned long long stride = strides[i];
        MAP(stride % alignment == 0, "globalStrides[%u] must be a multiple of %u, got %llu", i, alignment, stride);
        MAP(stride < 1ull << 40, "globalStrides[%u] must be below 2^40, got %llu", i, stride);
        MAP(stride >= extent, "globalStrides[%u] must be at least the %llu bytes that it steps over, got %llu", i,
            (unsigned long long)extent, stride);
        extent = stride;
    }
    if (interleave == CU_TENSOR_MAP_INTERLEAVE_NONE) {
        unsigned inner = box[0] * size;
        MAP(inner % 16 == 0, "boxDim[0] must be a multiple of 16 bytes, got %u", inner);
        MAP(!SPANS[swizzle] || inner <= SPANS[swizzle], "boxDim[0] must be at most the swizzle's %u bytes, got %u",
            SPANS[swizzle], inner);
    } else
        MAP(interleave != CU_TENSOR_MAP_INTERLEAVE_32B || swizzle == CU_TENSOR_MAP_SWIZZLE_32B,
            "32-byte interleave needs the swizzle of 32 bytes, got %d", swizzle);
    bool floating = type >= CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    MAP(fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE || floating, "only floating point is filled by NaN, type %d", type);
    MAP((unsigned)promotion <= CU_TENSOR_MAP_L2_PROMOTION_L2_256B, "unknown L2 promotion %d", promotion);
    memset(map, 0, sizeof *map);
    memcpy(map, &ENCODED, sizeof ENCODED);
    return CUDA_SUCCESS;
}

/* Launches ---------------------------------------------------------------------------------------------------------- */

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction of, void **parameters, void **extra) {
    MAY_REFUSE();
    struct function *function = (struct function *)of;
    REQUIRE(function, "cuLaunchKernelEx: no function%s", "");
#define LAUNCH(holds, rule, ...) REQUIRE(holds, "cuLaunchKernelEx, %s: " rule, function->name, __VA_ARGS__)
    unsigned x = config->gridDimX, y = config->gridDimY, z = config->gridDimZ;
    LAUNCH(x && y && z, "no dimension of the grid may be 0, got %u x %u x %u", x, y, z);
    LAUNCH(x <= 0x7fffffff, "gridDimX must be at most 2^31 - 1, got %u", x);
    LAUNCH(y <= 65535 && z <= 65535, "gridDimY and gridDimZ must be at most 65535, got %u, %u", y, z);
    unsigned block[3] = {config->blockDimX, config->blockDimY, config->blockDimZ};
    unsigned threads = block[0] * block[1] * block[2];
    LAUNCH(threads >= 1 && threads <= 1024, "a block has 1 to 1024 threads, got %u", threads);
    LAUNCH(!function->threads[0] || !memcmp(block, function->threads, sizeof block),
           "compiled for blocks of %u threads, got %u", function->threads[0], block[0]);
    /* A warp's registers come in units of 256. */
    unsigned registers = (function->registers * 32 + 255) / 256 * 256 * ((threads + 31) / 32);
    LAUNCH(registers <= 65536, "%u threads of %u registers: a multiprocessor has 65536", threads, function->registers);
    unsigned shared = config->sharedMemBytes, limit = function->dynamic ? function->dynamic : 48 << 10;
    LAUNCH(shared <= limit, "%u bytes of shared memory, it may have %u", shared, limit);
    LAUNCH(shared + function->shared <= device->block_kib << 10, "%u bytes of shared memory, sm_%d gives a block %u",
           shared + function->shared, device->capability, device->block_kib << 10);
    for (unsigned i = 0; i < config->numAttrs; i++) {
        if (config->attrs[i].id != CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) continue;
        unsigned cluster = config->attrs[i].value.clusterDim.x;
        LAUNCH(device->capability >= 90, "clusters need sm_90, got sm_%d", device->capability);
        LAUNCH(cluster >= 1 && cluster <= 8 && x % cluster == 0, "a cluster of %u must be 1 to 8 and divide gridDimX %u",
               cluster, x);
    }
    for (unsigned i = 0; i < function->parameters; i++) {
        if (function->sizes[i] != sizeof(CUtensorMap)) continue;
        LAUNCH(!memcmp(parameters[i], &ENCODED, sizeof ENCODED), "parameter %u is no tensor map", i);
    }
    written += snprintf(launches + written, sizeof launches - written, "%s grid %u %u %u block %u %u %u shared %u\n",
                        function->name, x, y, z, block[0], block[1], block[2], shared);
    if (written >= sizeof launches) return written = 0, wrong(CUDA_ERROR_OUT_OF_MEMORY, "too many launches unread");
    return CUDA_SUCCESS;
}
