// prelude.h: stands in front of every text that is compiled.
#pragma once

#include "emulator/launch.h"

#include "emulator/builtins.h"
#include "emulator/floats.h"
