# The whole build, out of tree: objects under build/<configuration>/.
#   make            release program and library        make test        all tests
#   make test PATTERN='cli_*,train_*'                   only those tests; JOBS=1: one after the other
#   make SAN=address,undefined test                     make HOSTILE=1 test
#   make GUARD=1 test            a page that stops who reads too far behind each block and mapped file
#   make ONEDNN=build/onednn3 test                      with another oneDNN (tools/onednn3.sh gets one)
#   make fault      tests with each allocation failing  make fuzz        parsers on hostile bytes
#   make aarch64    compiles for it                     make layers size format
# It looks for oneDNN, libvips and the rest with pkg-config and prints what it found.
SAN ?=
HOSTILE ?=
DEBUG ?=
GUARD ?=
comma := ,
CONFIG := release
ifneq ($(DEBUG),)
CONFIG := debug
endif
ifneq ($(SAN),)
CONFIG := san-$(subst $(comma),-,$(SAN))
endif
ifneq ($(HOSTILE),)
CONFIG := $(CONFIG)-hostile
endif

ifneq ($(GUARD),)
CONFIG := $(CONFIG)-guard
endif

CC ?= cc
PKG := vips gio-2.0 jansson libpcre2-8 libutf8proc
# oneDNN: a prefix given by ONEDNN=DIR (with include/ and lib/), else what the system has.
ONEDNN ?=
ifneq ($(ONEDNN),)
DNNL_CFLAGS := -I$(ONEDNN)/include
DNNL_LIBS := -L$(ONEDNN)/lib -Wl,-rpath,$(abspath $(ONEDNN))/lib -ldnnl
BUILD := build/$(CONFIG)-onednn
else
DNNL_CFLAGS :=
DNNL_LIBS := -ldnnl
BUILD := build/$(CONFIG)
endif
# Objects that do not see oneDNN's headers are the same with any.
OBJ := build/$(CONFIG)
PKG_CFLAGS := $(shell pkg-config --cflags $(PKG))
PKG_LIBS := $(shell pkg-config --libs $(PKG))

WARN := -Wall -Wextra -Wshadow -Wvla -Wundef -Wstrict-prototypes -Wmissing-prototypes \
        -Wno-missing-field-initializers -Wno-sign-compare
OPT := -O2 -DNDEBUG
ISA_OPT := -O3
ifneq ($(DEBUG)$(HOSTILE)$(SAN),)
OPT := -O1
endif
SANFLAGS :=
ifneq ($(SAN),)
# checks of unrolled loops take the compiler five times as long; for a report's lines -g1 is enough
ISA_OPT := -O1
SANFLAGS := -g1 -fsanitize=$(SAN) -fno-omit-frame-pointer -fno-sanitize-recover=all
endif
ifneq ($(HOSTILE),)
OPT += -DVEL_HOSTILE=1
endif
ifneq ($(GUARD),)
OPT += -DVEL_GUARD=1
endif
CFLAGS ?= -g
ALL_CFLAGS := -std=gnu11 $(CFLAGS) $(OPT) $(WARN) $(SANFLAGS) -fopenmp -fPIC -fvisibility=hidden \
    -ffp-contract=off -Iinclude -Isrc -MMD -MP $(DNNL_CFLAGS) $(PKG_CFLAGS)
LIBS := $(DNNL_LIBS) $(PKG_LIBS) -llapack -lm -ldl -lpthread

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
ISA_OBJ := $(foreach i,$(ISAS),$(patsubst src/backend/cpu/isa/%.c,$(OBJ)/isa-$(i)/%.o,$(ISA_SRC)))

LIB_SRC := $(wildcard src/*.c src/base/*.c src/graph/*.c src/ops/*.c src/passes/*.c \
    src/backend/*.c src/backend/null/*.c src/backend/cpu/*.c src/exec/*.c src/formats/*.c \
    src/tokenizers/*.c src/models/*.c src/adapters/*.c src/data/*.c src/sample/*.c src/train/*.c src/dialects/*.c)
DNNL_SRC := $(wildcard src/backend/cpu/onednn*.c)
LIB_OBJ := $(patsubst %.c,$(OBJ)/%.o,$(filter-out $(DNNL_SRC),$(LIB_SRC))) $(DNNL_SRC:%.c=$(BUILD)/%.o) $(ISA_OBJ)
CLI_SRC := $(wildcard cli/*.c)
CLI_OBJ := $(CLI_SRC:%.c=$(OBJ)/%.o)
TEST_SRC := $(wildcard tests/*.c)
TEST_OBJ := $(TEST_SRC:%.c=$(OBJ)/%.o)

.PHONY: all test plans test-gpu clean layers format size objects fault fuzz aarch64 cuda
all: $(BUILD)/velatura
objects: $(LIB_OBJ) $(CLI_OBJ)

$(BUILD)/libvelatura.a: $(LIB_OBJ)
	@rm -f $@
	@ar rcs $@ $^
$(BUILD)/velatura: $(CLI_OBJ) $(BUILD)/libvelatura.a
	$(CC) $(ALL_CFLAGS) -o $@ $^ $(LIBS)
$(BUILD)/run-tests: $(TEST_OBJ) $(BUILD)/libvelatura.a
	$(CC) $(ALL_CFLAGS) -o $@ $^ $(LIBS)
define object_rule
$(1)/%.o: %.c
	@mkdir -p $$(@D)
	$(CC) $(ALL_CFLAGS) -c -o $$@ $$<
endef
$(foreach folder,$(sort $(OBJ) $(BUILD)),$(eval $(call object_rule,$(folder))))
define isa_rule
$(OBJ)/isa-$(1)/%.o: src/backend/cpu/isa/%.c
	@mkdir -p $$(@D)
	$(CC) $(ALL_CFLAGS) $(ISA_OPT) -ffp-contract=fast -fno-math-errno $(ISA_FLAGS_$(1)) -c -o $$@ $$<
endef
$(foreach i,$(ISAS),$(eval $(call isa_rule,$(i))))

# ---- the backend for NVIDIA GPUs: a shared object of its own, loaded when there is a driver ----
# make cuda                       for Hopper (what is developed on), PTX for newer cards
# make cuda CUDA_ARCHS=all        for every card that this nvcc knows, PTX for newer ones
# Needs CUDA's nvcc and headers, cuBLASLt and cuDNN 9; the program itself needs none of them.
CUDA_HOME ?= /usr/local/cuda
NVCC ?= $(CUDA_HOME)/bin/nvcc
CUDA_ARCHS ?= 90
ifeq ($(CUDA_ARCHS),all)
CUDA_CODES = $(sort $(subst sm_,,$(shell $(NVCC) --list-gpu-code)))
else
CUDA_CODES = $(CUDA_ARCHS)
endif
CUDA_NEWEST = $(shell printf '%s\n' $(CUDA_CODES) | sort -n | tail -1)
CUDA_GENCODE = $(foreach a,$(CUDA_CODES),-gencode arch=compute_$(a),code=sm_$(a)) \
    -gencode arch=compute_$(CUDA_NEWEST),code=compute_$(CUDA_NEWEST)
# what capability 9.0 alone has (hopper.cuh); other cards find no image of it and go without
HOPPER_GENCODE = -gencode arch=compute_90a,code=sm_90a
NVCCFLAGS ?= -O3
CUDA_OBJ := $(OBJ)/cuda-$(CUDA_ARCHS)
CUDA_OBJECTS := $(patsubst src/backend/cuda/%.c,$(CUDA_OBJ)/%.o,$(wildcard src/backend/cuda/*.c)) \
    $(patsubst src/backend/cuda/kernels/%.cu,$(CUDA_OBJ)/kernels/%.o,$(wildcard src/backend/cuda/kernels/*.cu))
CUDA_LIBS := -L$(CUDA_HOME)/lib64 -lcublasLt -lcudnn -lcudart_static -lrt -lstdc++
cuda: $(BUILD)/libvelatura-cuda.so $(BUILD)/old-driver/libcuda.so.1
# a driver that is too old, for a test
$(BUILD)/old-driver/libcuda.so.1: tests/driver/old.c
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) -fvisibility=default -shared -o $@ $<
$(CUDA_OBJ)/%.o: src/backend/cuda/%.c
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) -Wno-undef -isystem $(CUDA_HOME)/include -c -o $@ $<
$(CUDA_OBJ)/kernels/%.o: src/backend/cuda/kernels/%.cu
	@mkdir -p $(@D)
	$(if $(findstring ccache,$(CC)),ccache) $(NVCC) -std=c++17 $(NVCCFLAGS) $(CUDA_GENCODE) -MMD -MP -MF $(@:.o=.d) -lineinfo \
	    -Xcompiler -fPIC,-fvisibility=hidden -c -o $@ $<
$(CUDA_OBJ)/kernels/attention_hopper.o $(CUDA_OBJ)/kernels/attention_hopper_forward.o: CUDA_GENCODE = $(HOPPER_GENCODE)
$(BUILD)/libvelatura-cuda.so: $(CUDA_OBJECTS) $(BUILD)/libvelatura.a
	@printf '{ global: vel_backend_entry_0; local: *; };\n' >$(CUDA_OBJ)/exports.map
	$(CC) $(ALL_CFLAGS) -shared -Wl,--no-undefined -Wl,--as-needed -Wl,-Bsymbolic \
	    -Wl,--version-script=$(CUDA_OBJ)/exports.map -o $@ $^ $(CUDA_LIBS) $(LIBS)

# Sanitizers: libraries that keep tables to their end are named in tests/lsan.supp.
TEST_ENV := OMP_WAIT_POLICY=passive LSAN_OPTIONS=suppressions=$(CURDIR)/tests/lsan.supp:print_suppressions=0
TEST_ENV += UBSAN_OPTIONS=print_stacktrace=1 ASAN_OPTIONS=detect_stack_use_after_return=1
PATTERN ?=
SKIP ?=
JOBS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
# at least two threads each, or nothing that threads do would be tried
TEST_THREADS := $(shell n=$$(($$(nproc) / $(JOBS))); echo $$((n > 2 ? n : 2)))
TEST_ENV += OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(TEST_THREADS)}
test: $(BUILD)/run-tests $(BUILD)/velatura
	$(TEST_ENV) $(BUILD)/run-tests --jobs $(JOBS) --program $(BUILD)/velatura $(if $(SKIP),--skip '$(SKIP)') $(if $(PATTERN),'$(PATTERN)')
# On a GPU: its kernels against the op table in three types, with the libraries and without, the
# optimizer against the CPU's, then the goldens of the model and of training.
# the snapshots of the families' graphs, to be looked at with git diff
plans: $(BUILD)/run-tests
	mkdir -p tests/plans
	VELATURA_WRITE_PLANS=1 $(BUILD)/run-tests plans_of_families

DEVICE ?= cuda
test-gpu: $(BUILD)/run-tests $(BUILD)/velatura $(BUILD)/libvelatura-cuda.so
	$(TEST_ENV) VELATURA_TEST_DEVICE=$(DEVICE) $(BUILD)/run-tests --program $(BUILD)/velatura 'gpu_*'
	$(BUILD)/velatura check-golden tests/golden/emoji-sd --model models/emoji-sd
# Each test once for each of its allocations that fails, at most MOST of them, evenly spread; MOST=0: all.
# Left out: tests of single kernels, which allocate nothing but what the test itself compares, and tests
# that are not written for it yet: they go on with what they themselves could not allocate.
MOST ?= 40
FAULT_SKIP := cpu_*,null_plans_only
fault: $(BUILD)/run-tests $(BUILD)/velatura
	$(TEST_ENV) $(BUILD)/run-tests --jobs $(JOBS) --fault --most $(MOST) --program $(BUILD)/velatura --skip '$(FAULT_SKIP)$(if $(SKIP),$(comma)$(SKIP))' '$(or $(PATTERN),*)'
# With clang's libFuzzer where there is one, else the mutations of tests/fuzz/fuzz_main.c.
FUZZ_SECONDS ?= 10
fuzz:
	tools/fuzz.sh $(FUZZ_SECONDS)
# Objects of everything, for a machine that this one is not; needs only a cross compiler.
aarch64:
	tools/aarch64.sh
clean:
	rm -rf build
layers:
	tools/layers.sh
size:
	tools/size.sh
FORMAT ?= clang-format-14
format:
	$(FORMAT) --dry-run --Werror $(wildcard src/*.[ch] src/*/*.[ch] src/*/*/*.[ch] src/*/*/*/*.[ch] \
	    src/backend/cuda/kernels/*.cu src/backend/cuda/kernels/*.cuh cli/*.[ch] \
	    tests/*.[ch] tests/driver/*.c tests/fuzz/*.[ch] include/*.h)
# Ids of CLIP's tokenizer for lines of text; tools/golden/tokenizer.py compares them with the peer's.
$(BUILD)/tokenizer-ids: tools/golden/tokenizer_ids.c $(BUILD)/libvelatura.a
	$(CC) $(ALL_CFLAGS) -o $@ $^ $(LIBS)
# ---- the shared library and what `make install` leaves ----
# make install PREFIX=/usr/local DESTDIR=/tmp/package
PREFIX ?= /usr/local
LIBDIR ?= $(PREFIX)/lib
DESTDIR ?=
VERSION := $(shell awk '/define VEL_VERSION_/ { v = v s $$3; s = "." } END { print v }' include/velatura.h)
SONAME := libvelatura.so.$(firstword $(subst ., ,$(VERSION)))
.PHONY: shared install uninstall
shared: $(BUILD)/libvelatura.so
$(BUILD)/libvelatura.so: $(LIB_OBJ) velatura.map
	$(CC) $(ALL_CFLAGS) -shared -Wl,-soname,$(SONAME) -Wl,--version-script=velatura.map -o $@ $(LIB_OBJ) $(LIBS)
$(BUILD)/velatura.pc: velatura.pc.in Makefile include/velatura.h
	@mkdir -p $(@D)
	sed -e 's|@PREFIX@|$(PREFIX)|' -e 's|@LIBDIR@|$(LIBDIR)|' -e 's|@VERSION@|$(VERSION)|' \
	    -e 's|@PRIVATE_LIBS@|$(LIBS) -fopenmp|' $< >$@
install: $(BUILD)/velatura $(BUILD)/libvelatura.so $(BUILD)/libvelatura.a
	@rm -f $(BUILD)/velatura.pc
	@$(MAKE) -s $(BUILD)/velatura.pc
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/include $(DESTDIR)$(LIBDIR)/pkgconfig
	install -m 755 $(BUILD)/velatura $(DESTDIR)$(PREFIX)/bin/velatura
	ln -sf velatura $(DESTDIR)$(PREFIX)/bin/vel
	ln -sf velatura $(DESTDIR)$(PREFIX)/bin/velatura-accelerate
	install -d $(addprefix $(DESTDIR)$(PREFIX)/share/,man/man1 bash-completion/completions \
	    zsh/site-functions fish/vendor_completions.d)
	$(BUILD)/velatura help --man >$(DESTDIR)$(PREFIX)/share/man/man1/velatura.1
	$(BUILD)/velatura help --bash >$(DESTDIR)$(PREFIX)/share/bash-completion/completions/velatura
	$(BUILD)/velatura help --zsh >$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_velatura
	$(BUILD)/velatura help --fish >$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/velatura.fish
	install -m 644 include/velatura.h $(DESTDIR)$(PREFIX)/include/velatura.h
	install -m 644 $(BUILD)/libvelatura.a $(DESTDIR)$(LIBDIR)/libvelatura.a
	install -m 755 $(BUILD)/libvelatura.so $(DESTDIR)$(LIBDIR)/libvelatura.so.$(VERSION)
	ln -sf libvelatura.so.$(VERSION) $(DESTDIR)$(LIBDIR)/$(SONAME)
	ln -sf $(SONAME) $(DESTDIR)$(LIBDIR)/libvelatura.so
	install -m 644 $(BUILD)/velatura.pc $(DESTDIR)$(LIBDIR)/pkgconfig/velatura.pc
uninstall:
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/,bin/velatura bin/vel bin/velatura-accelerate \
	    include/velatura.h share/man/man1/velatura.1 share/bash-completion/completions/velatura \
	    share/zsh/site-functions/_velatura share/fish/vendor_completions.d/velatura.fish) \
	    $(addprefix $(DESTDIR)$(LIBDIR)/,libvelatura.a libvelatura.so $(SONAME) libvelatura.so.$(VERSION) \
	    pkgconfig/velatura.pc)
# tests/test_api.c looks at the library beside the program, and runs the example with it
test: $(BUILD)/libvelatura.so $(BUILD)/tiny
$(BUILD)/tiny: examples/tiny.c $(BUILD)/libvelatura.so
	ln -sf libvelatura.so $(BUILD)/$(SONAME)
	$(CC) -std=c11 $(CFLAGS) $(WARN) $(SANFLAGS) -Iinclude -o $@ $< -L$(BUILD) -lvelatura -Wl,-rpath,'$$ORIGIN'

-include $(CUDA_OBJECTS:.o=.d) $(LIB_OBJ:.o=.d) $(CLI_OBJ:.o=.d) $(TEST_OBJ:.o=.d)
