# CUTLASS is header-only here and comes from the package `nvidia-cutlass` (or -DCUTLASS_INCLUDE_DIR=...): nothing is vendored.
if(NOT CUTLASS_INCLUDE_DIR)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import pathlib, importlib.util as u; print(pathlib.Path(list(u.find_spec('cutlass_library').submodule_search_locations)[0]) / 'source' / 'include')"
    OUTPUT_VARIABLE CUTLASS_INCLUDE_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
if(NOT EXISTS "${CUTLASS_INCLUDE_DIR}/cutlass/version.h")
  message(FATAL_ERROR "CUTLASS headers not found (looked in '${CUTLASS_INCLUDE_DIR}'): pip install --no-deps nvidia-cutlass==4.2.0.0")
endif()
file(STRINGS ${CUTLASS_INCLUDE_DIR}/cutlass/version.h version_lines REGEX "#define CUTLASS_(MAJOR|MINOR) ")
string(REGEX MATCHALL "[0-9]+" version_numbers "${version_lines}")
list(JOIN version_numbers "." cutlass_version)
if(cutlass_version VERSION_LESS 4.0)
  message(FATAL_ERROR "CUTLASS ${cutlass_version} is too old: 4.0 or newer is needed")
endif()
message(STATUS "eightfold: CUTLASS ${cutlass_version} headers at ${CUTLASS_INCLUDE_DIR}")
add_library(eightfold_cutlass INTERFACE)
target_include_directories(eightfold_cutlass SYSTEM INTERFACE ${CUTLASS_INCLUDE_DIR})
