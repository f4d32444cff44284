# nvcc: the system's, or with LONGSPAN_CUDA=wheels that of the nvidia-cuda-* wheels in the building
# interpreter. Sets LONGSPAN_CUDA_FOUND, and CMAKE_CUDA_COMPILER for enable_language(CUDA).
set(LONGSPAN_CUDA_FOUND OFF)
if(LONGSPAN_CUDA STREQUAL "wheels")
  find_package(Python COMPONENTS Interpreter Development.Module REQUIRED)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "import importlib.util as u, os; print([os.path.join(r, 'cu13') for r in u.find_spec('nvidia').submodule_search_locations if os.path.exists(os.path.join(r, 'cu13/bin/nvcc'))][0])"
    OUTPUT_VARIABLE _cuda_root OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  set(CMAKE_CUDA_COMPILER "${_cuda_root}/bin/nvcc")
  set(CMAKE_CUDA_FLAGS_INIT "-L${_cuda_root}/lib")
  set(ENV{LIBRARY_PATH} "${_cuda_root}/lib:$ENV{LIBRARY_PATH}")
  set(LONGSPAN_CUDA_FOUND ON)
else()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(LONGSPAN_CUDA_FOUND ON)
  elseif(LONGSPAN_CUDA STREQUAL "ON")
    message(FATAL_ERROR "LONGSPAN_CUDA=ON: expected nvcc in PATH or /usr/local/cuda, found none")
  else()
    message(STATUS "longspan: no nvcc was found, the CUDA backend is not built")
  endif()
endif()
