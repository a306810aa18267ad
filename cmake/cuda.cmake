# Whether the CUDA backend is built, MACHMOE_HAS_CUDA: decided anew at every configure, so that a build folder sees an nvcc that came after it.
set(MACHMOE_CUDA AUTO CACHE STRING "The CUDA backend: AUTO builds it where a usable nvcc is found, ON demands one, OFF leaves the backend out")
set_property(CACHE MACHMOE_CUDA PROPERTY STRINGS AUTO ON OFF)
set(MACHMOE_CUDA_MINIMUM 12.5)   # the first with cudaGetDriverEntryPointByVersion
if(NOT MACHMOE_CUDA)
  message(STATUS "CUDA backend: no, MACHMOE_CUDA is ${MACHMOE_CUDA}")
  return()
endif()

# Why nvcc cannot build the backend, empty where it can: enable_language would stop there. An nvcc that could is not asked again, since CUDAHOSTCXX
# and CUDAFLAGS count, as in all of CMake, when a folder is configured first.
function(machmoe_nvcc_problem nvcc result)
  set(problem "")
  execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE version ERROR_VARIABLE version)
  string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" release "${version}")
  set(release ${CMAKE_MATCH_1})
  if(NOT nvcc)
    set(problem "CUDACXX, CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda have no nvcc")
  elseif(NOT release)
    set(problem "${nvcc} --version tells no release")
  elseif(release VERSION_LESS MACHMOE_CUDA_MINIMUM)
    set(problem "${nvcc} is of CUDA ${release}")
  elseif(NOT MACHMOE_NVCC_WORKS STREQUAL "${nvcc} ${release}")
    set(host ${CMAKE_CUDA_HOST_COMPILER} $ENV{CUDAHOSTCXX})
    list(TRANSFORM host PREPEND -ccbin=)
    separate_arguments(flags UNIX_COMMAND "$ENV{CUDAFLAGS} ${CMAKE_CUDA_FLAGS}")
    execute_process(COMMAND ${nvcc} ${host} ${flags} -std=c++20 -arch=sm_90a -o ${CMAKE_BINARY_DIR}/CMakeFiles/cuda_probe
                            ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/cuda_probe.cu
                    RESULT_VARIABLE failed OUTPUT_VARIABLE log ERROR_VARIABLE log)
    if(failed)
      string(REGEX MATCH "[^\n]*(error|fatal)[^\n]*" line "${log}")
      set(problem "${nvcc} of CUDA ${release} does not compile cmake/cuda_probe.cu (${line})")
    else()
      set(MACHMOE_NVCC_WORKS "${nvcc} ${release}" CACHE INTERNAL "")
    endif()
  endif()
  set(${result} "${problem}" PARENT_SCOPE)
endfunction()

if(IS_ABSOLUTE "${CMAKE_CUDA_COMPILER}" AND NOT EXISTS "${CMAKE_CUDA_COMPILER}")
  unset(CMAKE_CUDA_COMPILER CACHE)   # it has gone since the last configure
endif()
find_program(CMAKE_CUDA_COMPILER NAMES $ENV{CUDACXX} nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin NO_CACHE)
machmoe_nvcc_problem(${CMAKE_CUDA_COMPILER} problem)
set(needed "needed are nvcc of CUDA ${MACHMOE_CUDA_MINIMUM} or later and a C++20 compiler that it supports")
if(problem AND MACHMOE_CUDA STREQUAL "AUTO")
  message(STATUS "CUDA backend: no, ${problem}; ${needed}")
  return()
elseif(problem)
  message(FATAL_ERROR "MACHMOE_CUDA is ${MACHMOE_CUDA}, but ${problem}; ${needed}. Name one with -DCMAKE_CUDA_COMPILER=/path/to/nvcc, "
                      "or leave the backend out with -DMACHMOE_CUDA=OFF.")
endif()

set(MACHMOE_HAS_CUDA ON)
set(CMAKE_CUDA_COMPILER ${CMAKE_CUDA_COMPILER} CACHE FILEPATH "nvcc, kept by this build folder as every compiler is")
enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)   # CMake 3.25 does not know that nvcc has C++20
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()
message(STATUS "CUDA backend: yes, ${CMAKE_CUDA_COMPILER} of CUDA ${CMAKE_CUDA_COMPILER_VERSION}")
