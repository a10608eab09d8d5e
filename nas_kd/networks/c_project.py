"""A result in C++: a folder that runs an int8 file in TensorFlow Lite Micro, built by g++ on a PC or for a board."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from string import Template

from nas_kd.errors import ModelError, OutputError
from nas_kd.networks.micro import MicroInterpreter
from nas_kd.networks.tflite_file import Array, operators_of

MARGIN = 1024  # bytes of the arena beside what was measured: other versions' structures may be larger
_CORE = ("kernel_util",)
_KERNELS = {  # by operator: what registers it, and the files that it is in
    "CONV_2D": ("Conv2D", "conv conv_common"),
    "DEPTHWISE_CONV_2D": ("DepthwiseConv2D", "depthwise_conv depthwise_conv_common conv_common"),
    "FULLY_CONNECTED": ("FullyConnected", "fully_connected fully_connected_common"),
    "ADD": ("Add", "add add_common"),
    "MUL": ("Mul", "mul mul_common"),
    "MEAN": ("Mean", "reduce reduce_common"),
    "MAX_POOL_2D": ("MaxPool2D", "pooling pooling_common"),
    "AVERAGE_POOL_2D": ("AveragePool2D", "pooling pooling_common"),
    "CONCATENATION": ("Concatenation", "concatenation"),
    "PAD": ("Pad", "pad pad_common"),
    "PADV2": ("PadV2", "pad pad_common"),
    "QUANTIZE": ("Quantize", "quantize quantize_common"),
    "HARD_SWISH": ("HardSwish", "hard_swish hard_swish_common"),
    "LOGISTIC": ("Logistic", "logistic logistic_common"),
    "RELU": ("Relu", "activations activations_common"),
    "RELU6": ("Relu6", "activations activations_common"),
}


def write_c(tflite: Path, image: Array, folder: Path) -> None:
    """Writes the files that run an int8 TensorFlow Lite file on one normalised image (C×H×W float32) and compare its
    outputs with the interpreter's here.

    Raises ModelError for an operator without a kernel that is known, OutputError where nothing can be written.
    """
    interpreter = MicroInterpreter(tflite)
    given = interpreter.rounded(image[None])
    expected = interpreter.outputs(given)
    operators = list(operators_of(tflite))
    if unknown := [kind for kind in operators if kind not in _KERNELS]:
        raise ModelError(f"{tflite} uses {', '.join(unknown)}, of which no kernel is known here")
    facts = {
        "count": str(len(operators)),
        "register": "\n".join(f"  ok = ok && resolver.Add{_KERNELS[kind][0]}() == kTfLiteOk;" for kind in operators),
        "kernels": " ".join(dict.fromkeys((*_CORE, *(" ".join(_KERNELS[kind][1] for kind in operators)).split()))),
        "arena": str(interpreter.arena().total + MARGIN),
        "model": _numbers(tflite.read_bytes()),
        "input": _numbers(given.ravel().tolist()),
        "output": _numbers(expected.ravel().tolist()),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in _FILES.items():
            (folder / name).write_text(Template(text).substitute(facts), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}; choose another folder") from error


def _numbers(values: Sequence[int]) -> str:
    return textwrap.fill(", ".join(map(str, values)), 118, initial_indent="  ", subsequent_indent="  ")


_MODEL_H = """\
// The network, and one test image with the outputs that are expected for it.
#pragma once

#include <cstdint>

constexpr int kArenaBytes = $arena;
extern const unsigned char kModel[];
extern const int8_t kInput[];
extern const int8_t kOutput[];
"""
_MODEL_CC = """\
#include "model.h"

alignas(16) const unsigned char kModel[] = {
$model
};
const int8_t kInput[] = {
$input
};
const int8_t kOutput[] = {
$output
};
"""
_MAIN = """\
// Runs the network on the test image and compares what it answers with what is expected: 0 if that is the same.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "model.h"
#include "tensorflow/lite/micro/micro_interpreter.h"
#include "tensorflow/lite/micro/micro_mutable_op_resolver.h"
#include "tensorflow/lite/schema/schema_generated.h"

namespace {
alignas(16) uint8_t arena[kArenaBytes];
}

int main() {
  bool ok = true;
  tflite::MicroMutableOpResolver<$count> resolver;
$register
  if (!ok) return 2;
  tflite::MicroInterpreter interpreter(tflite::GetModel(kModel), resolver, arena, kArenaBytes);
  if (interpreter.AllocateTensors() != kTfLiteOk) return 2;

  TfLiteTensor* input = interpreter.input(0);
  std::memcpy(input->data.int8, kInput, input->bytes);
  if (interpreter.Invoke() != kTfLiteOk) return 2;

  const TfLiteTensor* output = interpreter.output(0);
  int largest = 0, best = 0;
  for (int i = 0; i < static_cast<int>(output->bytes); ++i) {
    const int apart = std::abs(output->data.int8[i] - kOutput[i]);
    if (apart > largest) largest = apart;
    if (output->data.int8[i] > output->data.int8[best]) best = i;
  }
  std::printf("class %d, arena %d bytes, at most %d steps from what is expected\\n", best,
              static_cast<int>(interpreter.arena_used_bytes()), largest);
  return largest == 0 ? 0 : 1;
}
"""
_MAKEFILE = """\
# make TFLITE_MICRO=DIR && ./result; README.md says what is in DIR
TF := $$(TFLITE_MICRO)/tflite-micro
LITE := $$(TF)/tensorflow/lite
MICRO := $$(LITE)/micro
NOT_NEEDED := %_test.cc $$(MICRO)/fake_% $$(MICRO)/mock_% $$(MICRO)/test_% $$(MICRO)/recording_% $$(MICRO)/hexdump.cc
CORE := $$(wildcard $$(MICRO)/*.cc $$(MICRO)/arena_allocator/*.cc $$(MICRO)/memory_planner/*.cc \\
  $$(MICRO)/tflite_bridge/*.cc $$(LITE)/core/api/*.cc $$(LITE)/core/c/*.cc $$(LITE)/kernels/*.cc \\
  $$(LITE)/kernels/internal/*.cc $$(LITE)/kernels/internal/reference/*.cc \\
  $$(TF)/tensorflow/compiler/mlir/lite/schema/*.cc $$(TF)/tensorflow/compiler/mlir/lite/core/api/*.cc)
KERNELS := $$(addprefix $$(MICRO)/kernels/,$$(addsuffix .cc,$kernels))
SOURCES := main.cc model.cc $$(filter-out $$(NOT_NEEDED),$$(CORE)) $$(KERNELS)
OBJECTS := $$(addprefix build/,$$(SOURCES:/%=%))
OBJECTS := $$(OBJECTS:.cc=.o)
CXXFLAGS += -std=c++17 -O2 -fno-rtti -fno-exceptions -fno-threadsafe-statics -ffunction-sections -fdata-sections \\
  -DTF_LITE_STATIC_MEMORY -DTF_LITE_DISABLE_X86_NEON -DTF_LITE_USE_CTIME \\
  -I. -I$$(TF) -I$$(TFLITE_MICRO)/flatbuffers/include -I$$(TFLITE_MICRO)/gemmlowp -I$$(TFLITE_MICRO)/ruy

result: $$(OBJECTS)
	$$(CXX) -Wl,--gc-sections $$^ -o $$@

build/%.o: %.cc
	@mkdir -p $$(@D)
	$$(CXX) $$(CXXFLAGS) -c $$< -o $$@

build/%.o: /%.cc
	@mkdir -p $$(@D)
	$$(CXX) $$(CXXFLAGS) -c $$< -o $$@
"""
_README = """\
# An int8 network for a microcontroller

`model.cc` holds the network as bytes, and a test image with the outputs that TensorFlow Lite Micro's interpreter gave
for it; `main.cc` the calls that run it, with the operators that it needs; its arena takes $arena bytes. To build it on
a PC:

```bash
mkdir micro && cd micro
git clone --depth 1 https://github.com/tensorflow/tflite-micro
git clone --depth 1 --branch v25.9.23 https://github.com/google/flatbuffers   # the one that tflite-micro names
git clone --depth 1 https://github.com/google/gemmlowp
git clone --depth 1 https://github.com/google/ruy
cd .. && make TFLITE_MICRO=$$PWD/micro && ./result
```

For a board take `main.cc` and `model.cc` into a project that has TensorFlow Lite Micro (its own makefiles, or your
vendor's package), read the image from your camera or sensor, and round it as `model.cc`'s image was: its input tensor
says how.
"""
_FILES = {
    "model.h": _MODEL_H,
    "model.cc": _MODEL_CC,
    "main.cc": _MAIN,
    "Makefile": _MAKEFILE,
    "README.md": _README,
}
