// What a driver reads of a cubin: of every kernel its registers, its threads, its memory, and where its parameters lie.
#include <elf.h>

enum { MOST_PARAMETERS = 512, MOST_KERNELS = 8 };
// Attributes of .nv.info and .nv.info.KERNEL, each (format, attribute, size or value of 2 bytes, payload of format 4).
enum {
  MAX_THREADS = 0x05, PARAM_CBANK = 0x0a, REQNTID = 0x10, FRAME_SIZE = 0x11, KPARAM_INFO = 0x17, REGCOUNT = 0x2f,
  WITH_PAYLOAD = 4
};

typedef struct {
  int offset, size;
} Parameter;

typedef struct {
  char name[256];
  int capability, registers, frame, static_shared, dynamic_limit;
  int max_threads, required_threads; // the second 0 where the kernel does not say
  int first_parameter; // where in the constant bank they begin: what is aligned is aligned there
  int n_parameters;
  Parameter parameters[MOST_PARAMETERS]; // in their order; of size 0 where the cubin says nothing
} Kernel;

typedef struct {
  int n_kernels;
  Kernel kernels[MOST_KERNELS];
} Module;

static Kernel *kernel_named(Module *module, const char *name) {
  for (int i = 0; i < module->n_kernels; i++)
    if (!strcmp(module->kernels[i].name, name)) return &module->kernels[i];
  return NULL;
}

static Kernel *kernel_made(Module *module, const char *name) {
  Kernel *kernel = kernel_named(module, name);
  if (kernel || module->n_kernels == MOST_KERNELS) return kernel;
  kernel = &module->kernels[module->n_kernels++];
  snprintf(kernel->name, sizeof kernel->name, "%s", name);
  kernel->max_threads = 1024;
  kernel->dynamic_limit = 48 << 10;
  return kernel;
}

// Compute capability that a cubin was made for: it moved by a byte with version 8 of its ABI.
static int capability_of(const Elf64_Ehdr *header) {
  return header->e_flags >> (header->e_ident[EI_ABIVERSION] >= 8 ? 8 : 0) & 0xff;
}

static void read_parameter(Kernel *kernel, const uint32_t *words) {
  int ordinal = words[1] & 0xffff;
  if (ordinal >= MOST_PARAMETERS) return;
  kernel->parameters[ordinal] = (Parameter){words[1] >> 16, words[2] >> 18};
  if (kernel->n_parameters <= ordinal) kernel->n_parameters = ordinal + 1;
}

// One section .nv.info, of all kernels (kernel NULL; its entries name a symbol), or .nv.info.KERNEL.
static void read_info(Module *module, Kernel *kernel, const unsigned char *at, const unsigned char *end,
                      const Elf64_Sym *symbols, const char *strings) {
  while (at + 4 <= end) {
    int attribute = at[1], size = at[0] == WITH_PAYLOAD ? at[2] | at[3] << 8 : 0;
    const uint32_t *words = (const uint32_t *)(at + 4);
    at += 4 + size;
    if (!size || at > end) continue;
    if (kernel && attribute == KPARAM_INFO) read_parameter(kernel, words);
    if (kernel && attribute == PARAM_CBANK) kernel->first_parameter = words[1] & 0xffff;
    if (kernel && attribute == MAX_THREADS) kernel->max_threads = words[0] * words[1] * words[2];
    if (kernel && attribute == REQNTID) kernel->required_threads = words[0] * words[1] * words[2];
    if (kernel || (attribute != REGCOUNT && attribute != FRAME_SIZE)) continue;
    Kernel *named = kernel_made(module, strings + symbols[words[0]].st_name);
    if (named && attribute == REGCOUNT) named->registers = words[1];
    if (named && attribute == FRAME_SIZE) named->frame = words[1];
  }
}

static Module *read_cubin(const unsigned char *image) {
  const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + header->e_shoff);
  const char *names = (const char *)image + sections[header->e_shstrndx].sh_offset;
  const Elf64_Sym *symbols = NULL;
  const char *strings = NULL;
  for (int i = 0; i < header->e_shnum; i++)
    if (sections[i].sh_type == SHT_SYMTAB) {
      symbols = (const Elf64_Sym *)(image + sections[i].sh_offset);
      strings = (const char *)image + sections[sections[i].sh_link].sh_offset;
    }
  if (!symbols) return NULL;
  Module *module = calloc(1, sizeof *module);
  for (int i = 0; i < header->e_shnum; i++) {
    const char *name = names + sections[i].sh_name;
    const unsigned char *at = image + sections[i].sh_offset;
    if (!strcmp(name, ".nv.info")) read_info(module, NULL, at, at + sections[i].sh_size, symbols, strings);
    if (!strncmp(name, ".nv.info.", 9))
      read_info(module, kernel_made(module, name + 9), at, at + sections[i].sh_size, symbols, strings);
    if (!strncmp(name, ".nv.shared.", 11) && strncmp(name, ".nv.shared.reserved", 19)) {
      Kernel *kernel = kernel_made(module, name + 11);
      if (kernel) kernel->static_shared = sections[i].sh_size;
    }
  }
  for (int i = 0; i < module->n_kernels; i++) module->kernels[i].capability = capability_of(header);
  return module;
}
