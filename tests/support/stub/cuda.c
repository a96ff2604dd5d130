// A libcuda.so.1 without a card: the functions of the driver that Triton calls, with the checks that the real one makes.
//
// It loads real cubins, refuses what a card's limits or a documented rule forbid, and keeps of every launch one line of JSON:
// grid, block, shared memory, stream, what the cubin says of the kernel, and offset, size and bytes of every parameter.
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

#include "cubin.h"
#include "tensormap.h"

enum { REGISTERS = 65536, MOST_THREADS = 1024, MOST_PARAMETER_BYTES = 32764, SHARED_OF_SYSTEM = 1 << 10 };

static int card = 90;         // compute capability
static char error[512] = "";  // what was refused last, and why
static char *record = NULL;   // of every launch since it was last cleared
static size_t length = 0, room = 0;

static void write_record(const char *format, ...) {
  va_list arguments;
  if (length + 1024 > room) record = realloc(record, room = 2 * room + 4096);
  va_start(arguments, format);
  length += vsnprintf(record + length, room - length, format, arguments);
  va_end(arguments);
}

static CUresult refuse(CUresult code, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(error, sizeof error, format, arguments);
  va_end(arguments);
  return code;
}

// Bytes of shared memory that one block may have, its own and what the driver keeps for itself aside.
static int shared_limit(void) {
  switch (card) {
  case 80: case 87: return 163 << 10;
  case 86: case 89: case 120: case 121: return 99 << 10;
  default: return 227 << 10;
  }
}

// --- for the tests ---

void stub_card(int capability) { card = capability; }
const char *stub_record(void) { return record ? record : ""; }
void stub_clear(void) {
  length = 0;
  if (record) record[0] = 0;
}

// --- errors, devices, contexts ---

CUresult cuGetErrorString(CUresult code, const char **text) {
  *text = code == CUDA_SUCCESS ? "no error" : error;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult code, const char **text) { return cuGetErrorString(code, text); }
CUresult cuInit(unsigned flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) {
  *version = 13020; // below, Triton changes a bit of small tensor maps
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int *count) {
  *count = 1;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  (void)device;
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_limit(); break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared_limit() + SHARED_OF_SYSTEM; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = REGISTERS; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 108; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 0;
  }
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)&card;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
  (void)context;
  return CUDA_SUCCESS;
}
#undef cuDevicePrimaryCtxRetain
CUresult cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  (void)stream;
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  (void)device;
  return cuCtxGetCurrent(context);
}
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  (void)limit;
  *value = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
  (void)limit, (void)value;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return refuse(CUDA_ERROR_INVALID_VALUE, "attribute %d", attribute);
  *(CUdeviceptr *)data = pointer; // memory of the CPU stands for the card's
  return CUDA_SUCCESS;
}

// --- modules and kernels ---

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (memcmp(image, ELFMAG, SELFMAG)) return refuse(CUDA_ERROR_INVALID_IMAGE, "the image is no ELF");
  int made_for = capability_of(image);
  if (made_for / 10 != card / 10 || made_for > card)
    return refuse(CUDA_ERROR_NO_BINARY_FOR_GPU, "a cubin of sm_%d on a card of sm_%d", made_for, card);
  *module = (CUmodule)read_cubin(image);
  return *module ? CUDA_SUCCESS : refuse(CUDA_ERROR_INVALID_IMAGE, "the cubin has no symbols");
}
CUresult cuModuleUnload(CUmodule module) {
  free(module);
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  Kernel *kernel = kernel_named((Module *)module, name);
  if (!kernel || !kernel->registers) return refuse(CUDA_ERROR_NOT_FOUND, "the module has no kernel %s", name);
  *function = (CUfunction)kernel;
  return CUDA_SUCCESS;
}

// Registers come in units of 256 for a warp, and warps in fours.
static int registers_of(const Kernel *kernel, int threads) {
  return (kernel->registers + 7) / 8 * 8 * 32 * (((threads + 31) / 32 + 3) / 4 * 4);
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  const Kernel *kernel = (const Kernel *)function;
  switch (attribute) {
  case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = kernel->registers; break;
  case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = kernel->frame; break;
  case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = kernel->static_shared; break;
  case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: {
    int threads = kernel->required_threads ? kernel->required_threads : kernel->max_threads;
    while (registers_of(kernel, threads) > REGISTERS) threads -= 32;
    *value = threads;
    break;
  }
  default: return refuse(CUDA_ERROR_INVALID_VALUE, "the stub knows no attribute %d of a kernel", attribute);
  }
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  Kernel *kernel = (Kernel *)function;
  if (attribute > CU_FUNC_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE) return CUDA_ERROR_INVALID_VALUE; // later than CUDA 12
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  if (value < 0 || value + kernel->static_shared > shared_limit())
    return refuse(CUDA_ERROR_INVALID_VALUE, "%d bytes of dynamic shared memory: the card has %d", value, shared_limit());
  kernel->dynamic_limit = value;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  (void)function, (void)config;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  (void)function, (void)config;
  *count = 1;
  return CUDA_SUCCESS;
}

// --- tensor maps ---

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  if (card < 90) return refuse(CUDA_ERROR_NOT_SUPPORTED, "tensor map: a card of sm_%d has none", card);
  const char *wrong = wrong_tensor_map(map, type, rank, (uintptr_t)address, dims, strides, box, steps, interleave, swizzle,
                                       promotion, fill);
  if (wrong) return refuse(CUDA_ERROR_INVALID_VALUE, "tensor map: %s", wrong);
  write_tensor_map(map, type, rank, (uintptr_t)address, dims, strides, box, interleave, swizzle, promotion, fill);
  return CUDA_SUCCESS;
}

// --- launches ---

static CUresult check_launch(const CUlaunchConfig *config, const Kernel *kernel) {
  uint64_t threads = (uint64_t)config->blockDimX * config->blockDimY * config->blockDimZ;
  if (kernel->capability / 10 != card / 10)
    return refuse(CUDA_ERROR_INVALID_HANDLE, "a kernel of sm_%d on a card of sm_%d", kernel->capability, card);
  if (!config->gridDimX || !config->gridDimY || !config->gridDimZ || config->gridDimX > 0x7fffffff || config->gridDimY > 65535
      || config->gridDimZ > 65535)
    return refuse(CUDA_ERROR_INVALID_VALUE, "grid %u x %u x %u", config->gridDimX, config->gridDimY, config->gridDimZ);
  if (!threads || threads > MOST_THREADS || config->blockDimZ > 64)
    return refuse(CUDA_ERROR_INVALID_VALUE, "%llu threads", (unsigned long long)threads);
  if (registers_of(kernel, threads) > REGISTERS)
    return refuse(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "%d registers for each of %d threads", kernel->registers, (int)threads);
  if ((int)threads > kernel->max_threads || (kernel->required_threads && (int)threads != kernel->required_threads))
    return refuse(CUDA_ERROR_INVALID_VALUE, "%d threads of a kernel made for %d", (int)threads,
                  kernel->required_threads ? kernel->required_threads : kernel->max_threads);
  if (config->sharedMemBytes > (unsigned)kernel->dynamic_limit)
    return refuse(CUDA_ERROR_INVALID_VALUE, "%u bytes of shared memory where %d were asked for", config->sharedMemBytes,
                  kernel->dynamic_limit);
  int last = kernel->n_parameters - 1;
  if (last >= 0 && kernel->parameters[last].offset + kernel->parameters[last].size > MOST_PARAMETER_BYTES)
    return refuse(CUDA_ERROR_INVALID_VALUE, "more than %d bytes of parameters", MOST_PARAMETER_BYTES);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  const Kernel *kernel = (const Kernel *)function;
  if (extra) return refuse(CUDA_ERROR_INVALID_VALUE, "the stub takes parameters one by one");
  CUresult refused = check_launch(config, kernel);
  if (refused) return refused;
  write_record("{\"name\": \"%s\", \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"shared\": %u, \"stream\": %llu, ",
               kernel->name, config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX, config->blockDimY,
               config->blockDimZ, config->sharedMemBytes, (unsigned long long)(uintptr_t)config->hStream);
  write_record("\"registers\": %d, \"frame\": %d, \"first\": %d, \"parameters\": [", kernel->registers, kernel->frame,
               kernel->first_parameter);
  for (int i = 0; i < kernel->n_parameters; i++) {
    const Parameter *parameter = &kernel->parameters[i];
    write_record("%s[%d, %d, \"", i ? ", " : "", parameter->offset, parameter->size);
    for (int k = 0; k < parameter->size; k++) write_record("%02x", ((unsigned char *)parameters[i])[k]);
    write_record("\"]");
  }
  write_record("]}\n");
  return CUDA_SUCCESS;
}
