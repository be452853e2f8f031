# The whole build, out of tree: objects under build/<configuration>/.
#   make            release program and library        make test        all tests
#   make SAN=address,undefined test                     make HOSTILE=1 test
# It looks for oneDNN, libvips and the rest with pkg-config and prints what it found.
SAN ?=
HOSTILE ?=
DEBUG ?=
CONFIG := release
ifneq ($(DEBUG),)
CONFIG := debug
endif
ifneq ($(SAN),)
comma := ,
CONFIG := san-$(subst $(comma),-,$(SAN))
endif
ifneq ($(HOSTILE),)
CONFIG := $(CONFIG)-hostile
endif

CC ?= cc
PKG := vips jansson libpcre2-8 libutf8proc
# oneDNN: a prefix given by ONEDNN=DIR (with include/ and lib/), else what the system has.
ONEDNN ?=
ifneq ($(ONEDNN),)
DNNL_CFLAGS := -I$(ONEDNN)/include
DNNL_LIBS := -L$(ONEDNN)/lib -Wl,-rpath,$(ONEDNN)/lib -ldnnl
CONFIG := $(CONFIG)-onednn
else
DNNL_CFLAGS :=
DNNL_LIBS := -ldnnl
endif
BUILD := build/$(CONFIG)
PKG_CFLAGS := $(shell pkg-config --cflags $(PKG))
PKG_LIBS := $(shell pkg-config --libs $(PKG))

WARN := -Wall -Wextra -Wshadow -Wvla -Wundef -Wstrict-prototypes -Wmissing-prototypes \
        -Wno-missing-field-initializers -Wno-sign-compare
OPT := -O2 -DNDEBUG
ifneq ($(DEBUG)$(HOSTILE)$(SAN),)
OPT := -O1
endif
SANFLAGS :=
ifneq ($(SAN),)
SANFLAGS := -fsanitize=$(SAN) -fno-omit-frame-pointer -fno-sanitize-recover=all
endif
ifneq ($(HOSTILE),)
OPT += -DVEL_HOSTILE=1
endif
CFLAGS ?= -g
ALL_CFLAGS := -std=gnu11 $(CFLAGS) $(OPT) $(WARN) $(SANFLAGS) -fopenmp -fPIC -fvisibility=hidden \
    -ffp-contract=off -Iinclude -Isrc -MMD -MP $(DNNL_CFLAGS) $(PKG_CFLAGS)
LIBS := $(DNNL_LIBS) $(PKG_LIBS) -lm -ldl -lpthread

ARCH := $(shell $(CC) -dumpmachine | cut -d- -f1)

# Kernels in src/backend/cpu/isa are compiled once per instruction set and chosen at run time.
ISA_SRC := $(wildcard src/backend/cpu/isa/*.c)
ifeq ($(ARCH),x86_64)
ISAS := base avx2 avx512 bf16
ISA_FLAGS_base := -DVEL_ISA=base
ISA_FLAGS_avx2 := -DVEL_ISA=avx2 -mavx2 -mfma -mf16c
AVX512_FLAGS := -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512
ISA_FLAGS_avx512 := -DVEL_ISA=avx512 $(AVX512_FLAGS)
ISA_FLAGS_bf16 := -DVEL_ISA=bf16 $(AVX512_FLAGS) -mavx512bf16 -mamx-tile -mamx-bf16
else
ISAS := base
ISA_FLAGS_base := -DVEL_ISA=base
endif
ISA_OBJ := $(foreach i,$(ISAS),$(patsubst src/backend/cpu/isa/%.c,$(BUILD)/isa-$(i)/%.o,$(ISA_SRC)))

LIB_SRC := $(wildcard src/*.c src/base/*.c src/graph/*.c src/ops/*.c src/passes/*.c \
    src/backend/*.c src/backend/null/*.c src/backend/cpu/*.c src/exec/*.c src/formats/*.c \
    src/tokenizers/*.c src/models/*.c src/adapters/*.c src/data/*.c src/sample/*.c src/train/*.c)
LIB_OBJ := $(LIB_SRC:%.c=$(BUILD)/%.o) $(ISA_OBJ)
CLI_SRC := $(wildcard cli/*.c)
CLI_OBJ := $(CLI_SRC:%.c=$(BUILD)/%.o)
TEST_SRC := $(wildcard tests/*.c)
TEST_OBJ := $(TEST_SRC:%.c=$(BUILD)/%.o)

.PHONY: all test clean layers format size objects
all: $(BUILD)/velatura
objects: $(LIB_OBJ) $(CLI_OBJ)

$(BUILD)/libvelatura.a: $(LIB_OBJ)
	@rm -f $@
	@ar rcs $@ $^
$(BUILD)/velatura: $(CLI_OBJ) $(BUILD)/libvelatura.a
	$(CC) $(ALL_CFLAGS) -o $@ $^ $(LIBS)
$(BUILD)/run-tests: $(TEST_OBJ) $(BUILD)/libvelatura.a
	$(CC) $(ALL_CFLAGS) -o $@ $^ $(LIBS)
$(BUILD)/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) -c -o $@ $<
define isa_rule
$(BUILD)/isa-$(1)/%.o: src/backend/cpu/isa/%.c
	@mkdir -p $$(@D)
	$(CC) $(ALL_CFLAGS) -O3 -ffp-contract=fast -fno-math-errno $(ISA_FLAGS_$(1)) -c -o $$@ $$<
endef
$(foreach i,$(ISAS),$(eval $(call isa_rule,$(i))))

test: $(BUILD)/run-tests $(BUILD)/velatura
	$(BUILD)/run-tests --program $(BUILD)/velatura
clean:
	rm -rf build
layers:
	tools/layers.sh
-include $(LIB_OBJ:.o=.d) $(CLI_OBJ:.o=.d) $(TEST_OBJ:.o=.d)
