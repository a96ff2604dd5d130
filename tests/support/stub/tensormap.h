// cuTensorMapEncodeTiled with every rule that CUDA's documentation has for it, and a tensor map that can be read again.
//
// One passage is no rule here: that each global stride be the one before times a padded extent. The driver holds nobody to
// it, and descriptors of packed sequences, Triton's own among them, rest on strides that overlap.

typedef struct { // in the 128 bytes of a CUtensorMap; a card's is opaque. MAP in tests/support/stub/__init__.py
  uint64_t address;
  uint8_t type, rank, swizzle, interleave, promotion, fill, zeros[2];
  uint64_t dims[5], strides[4];
  uint16_t box[5];
} Map;

enum { FLOAT16 = 6, PACKED_4_ALIGNED_8 = 13, PACKED_4 = 14, PACKED_6 = 15 };

static const char *wrong_tensor_map(const CUtensorMap *map, int type, unsigned rank, uint64_t address, const cuuint64_t *dims,
                                    const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps, int interleave,
                                    int swizzle, int promotion, int fill) {
  static const int BITS[] = {8, 16, 32, 32, 64, 64, 16, 32, 64, 16, 32, 32, 32, 4, 4, 6};
  static const unsigned SPANS[] = {0, 32, 64, 128, 128, 128, 128};
  if ((uintptr_t)map % 64) return "the map's own address is no multiple of 64";
  if (type < 0 || type > 15) return "tensorDataType";
  if (interleave < 0 || interleave > 2) return "interleave";
  if (swizzle < 0 || swizzle > 6) return "swizzle";
  if (promotion < 0 || promotion > 3) return "l2Promotion";
  if (fill < 0 || fill > 1) return "oobFill";
  if (rank < 1 || rank > 5) return "tensorRank: 1 to 5";
  if (interleave && rank < 3) return "tensorRank: 3 to 5 where it is interleaved";

  int wide = type == PACKED_4 || type == PACKED_6, coarse = wide || interleave == 2;
  if (address % (coarse ? 32 : 16)) return coarse ? "globalAddress: a multiple of 32" : "globalAddress: a multiple of 16";
  for (unsigned i = 0; i < rank; i++) {
    if (dims[i] < 1 || dims[i] > 1ull << 32) return "globalDim: 1 to 2^32";
    if (box[i] < 1 || box[i] > 256) return "boxDim: 1 to 256";
    if (i || interleave)
      if (steps[i] < 1 || steps[i] > 8) return "elementStrides: 1 to 8";
  }
  for (unsigned i = 0; i + 1 < rank; i++) {
    if (strides[i] >= 1ull << 40) return "globalStrides: below 2^40";
    if (strides[i] % (coarse ? 32 : 16)) return coarse ? "globalStrides: multiples of 32" : "globalStrides: multiples of 16";
  }
  if (wide && dims[0] % 128) return "globalDim[0]: a multiple of 128 for this type";
  if (wide && box[0] != 128) return "boxDim[0]: 128 for this type";
  if (type == PACKED_4_ALIGNED_8 && dims[0] % 2) return "globalDim[0]: a multiple of 2 for this type";

  unsigned row = box[0] * BITS[type] / 8;
  if (!interleave && row % 16) return "boxDim[0]: a multiple of 16 bytes";
  if (!interleave && swizzle && row > SPANS[swizzle]) return "boxDim[0]: no wider than the swizzle";
  if (interleave == 2 && swizzle != 1) return "swizzle: of 32 bytes where 32 are interleaved";
  if (type == PACKED_6 && interleave) return "interleave: none for this type";
  if (type == PACKED_6 && swizzle && swizzle != 3 && swizzle != 4 && swizzle != 6) return "swizzle: none such for this type";
  if (type == PACKED_4 && swizzle && swizzle != 3 && swizzle != 4) return "swizzle: none such for this type";
  if (fill && (type < FLOAT16 || type >= PACKED_4_ALIGNED_8)) return "oobFill: NaN in floating point alone";
  return NULL;
}

static void write_tensor_map(CUtensorMap *map, int type, unsigned rank, uint64_t address, const cuuint64_t *dims,
                             const cuuint64_t *strides, const cuuint32_t *box, int interleave, int swizzle, int promotion,
                             int fill) {
  Map made = {address, type, rank, swizzle, interleave, promotion, fill, {0, 0}, {0}, {0}, {0}};
  for (unsigned i = 0; i < rank; i++) made.dims[i] = dims[i], made.box[i] = box[i];
  for (unsigned i = 0; i + 1 < rank; i++) made.strides[i] = strides[i];
  _Static_assert(sizeof made <= sizeof *map, "a tensor map has 128 bytes");
  memset(map, 0, sizeof *map);
  memcpy(map, &made, sizeof made);
}
