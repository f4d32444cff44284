# nvcc, for the CUDA backend: the system's, or with LONGSPAN_CUDA=wheels that of the nvidia-cuda-*
# wheels in the building interpreter. Enables the language and sets LONGSPAN_CUDA_FOUND. Included by
# the top CMakeLists.txt, since a language is enabled for the directories below.
set(LONGSPAN_CUDA "AUTO" CACHE STRING
    "Build the CUDA backend: AUTO (where nvcc is found), ON, OFF or wheels")
set(LONGSPAN_CUDA_FOUND OFF)
if(NOT LONGSPAN_CUDA MATCHES "^(AUTO|ON|OFF|wheels)$")
  message(FATAL_ERROR "LONGSPAN_CUDA: expected AUTO, ON, OFF or wheels, got \"${LONGSPAN_CUDA}\"")
endif()
if(LONGSPAN_CUDA STREQUAL "OFF")
  return()
endif()
if(LONGSPAN_CUDA STREQUAL "wheels")
  find_package(Python COMPONENTS Interpreter Development.Module REQUIRED)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "import importlib.util as u, os; print([os.path.join(r, 'cu13') for r in u.find_spec('nvidia').submodule_search_locations if os.path.exists(os.path.join(r, 'cu13/bin/nvcc'))][0])"
    OUTPUT_VARIABLE _cuda_root OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  set(CMAKE_CUDA_COMPILER "${_cuda_root}/bin/nvcc")
  set(CMAKE_CUDA_FLAGS_INIT "-L${_cuda_root}/lib")
  set(ENV{LIBRARY_PATH} "${_cuda_root}/lib:$ENV{LIBRARY_PATH}")
else()
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    if(LONGSPAN_CUDA STREQUAL "ON")
      message(FATAL_ERROR "LONGSPAN_CUDA=ON: expected nvcc in PATH or /usr/local/cuda, found none")
    endif()
    message(STATUS "longspan: no nvcc was found, the CUDA backend is not built")
    return()
  endif()
endif()

if(NOT CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  set(CMAKE_CUDA_ARCHITECTURES "80-real;89-real;90a-real;90-virtual")  # the last for newer cards
endif()
if(LONGSPAN_CCACHE AND NOT CMAKE_CUDA_COMPILER_LAUNCHER)
  set(CMAKE_CUDA_COMPILER_LAUNCHER "${LONGSPAN_CCACHE}")
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
  message(FATAL_ERROR "longspan: expected nvcc 12.8 or later, got ${CMAKE_CUDA_COMPILER_VERSION}; "
                      "set LONGSPAN_CUDA=OFF to build for the CPU alone")
endif()
set(LONGSPAN_CUDA_FOUND ON)
