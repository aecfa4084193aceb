# torch's headers and libtorch_cpu from the installed Python package. Only the stable ABI is used (torch >= 2.11), so a
# library built against any later torch runs on all of them; find_package(Torch) would drag in CUDA targets we do not need.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import pathlib, importlib.util as u; print(pathlib.Path(u.find_spec('torch').origin).parent)"
  OUTPUT_VARIABLE torch_dir OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "torch is not installed for ${Python_EXECUTABLE}; build with --no-build-isolation in an environment that has torch >= 2.11")
endif()
add_library(eightfold_torch INTERFACE)
target_include_directories(eightfold_torch SYSTEM INTERFACE ${torch_dir}/include)
target_compile_definitions(eightfold_torch INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
target_link_directories(eightfold_torch INTERFACE ${torch_dir}/lib)
target_link_libraries(eightfold_torch INTERFACE torch_cpu c10)
