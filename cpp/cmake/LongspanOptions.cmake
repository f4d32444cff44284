# Compiler settings every target shares, through the interface target longspan_options.
if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)

set(LONGSPAN_SANITIZE "" CACHE STRING "Sanitizers to build with, such as address,undefined or thread")

find_program(LONGSPAN_CCACHE ccache)
if(LONGSPAN_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER "${LONGSPAN_CCACHE}")
endif()

add_library(longspan_options INTERFACE)
target_compile_features(longspan_options INTERFACE cxx_std_20)
target_compile_options(longspan_options INTERFACE -Wall -Wextra)
if(LONGSPAN_SANITIZE)
  target_compile_options(longspan_options INTERFACE -fsanitize=${LONGSPAN_SANITIZE}
                                                    -fno-omit-frame-pointer)
  target_link_options(longspan_options INTERFACE -fsanitize=${LONGSPAN_SANITIZE})
endif()
