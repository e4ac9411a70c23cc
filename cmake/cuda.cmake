# The CUDA module cnn_ext._cuda, beside _C: built where nvcc is found; a GPU is never needed to build it. With the static CUDA runtime and without
# -lcuda it loads on machines that have no driver.
set(CNN_EXT_CUDA auto CACHE STRING "Build the CUDA module: auto (if nvcc is found), on (or fail) or off")
set(CNN_EXT_CUDA_ARCHS "80;90" CACHE STRING "Compute capabilities to compile for: machine code of each, and portable code (PTX) of the newest")
if(NOT CNN_EXT_CUDA MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "CNN_EXT_CUDA: got \"${CNN_EXT_CUDA}\", want auto, on or off")
endif()
foreach(arch IN LISTS CNN_EXT_CUDA_ARCHS)
  if(NOT arch MATCHES "^[1-9][0-9]+[af]?$")
    message(FATAL_ERROR "CNN_EXT_CUDA_ARCHS: got \"${CNN_EXT_CUDA_ARCHS}\", want compute capabilities such as \"80;90\"")
  endif()
endforeach()

# Sets CNN_EXT_NVCC to the first nvcc among $CUDACXX, $CUDA_HOME/bin, $PATH and /usr/local/cuda/bin.
function(cnn_ext_find_nvcc)
  if(DEFINED ENV{CUDACXX})
    find_program(CNN_EXT_NVCC "$ENV{CUDACXX}")
  elseif(DEFINED ENV{CUDA_HOME})
    find_program(CNN_EXT_NVCC nvcc PATHS "$ENV{CUDA_HOME}/bin" NO_DEFAULT_PATH)
  endif()
  find_program(CNN_EXT_NVCC nvcc PATHS /usr/local/cuda/bin)
endfunction()

set(CNN_EXT_HAS_CUDA FALSE)
set(CNN_EXT_CUDA_REASON "switched off (CNN_EXT_CUDA=off)")
if(NOT CNN_EXT_CUDA STREQUAL "off")
  cnn_ext_find_nvcc()
  if(CNN_EXT_NVCC)
    include(CheckLanguage)
    set(ENV{CUDACXX} "${CNN_EXT_NVCC}")
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
      set(CNN_EXT_HAS_CUDA TRUE)
    else()
      set(CNN_EXT_CUDA_REASON "${CNN_EXT_NVCC} compiles nothing (see CMakeFiles/CMakeConfigureLog.yaml)")
    endif()
  else()
    set(CNN_EXT_CUDA_REASON "no nvcc in $CUDACXX, $CUDA_HOME/bin, $PATH or /usr/local/cuda/bin")
  endif()
  if(CNN_EXT_CUDA STREQUAL "on" AND NOT CNN_EXT_HAS_CUDA)
    message(FATAL_ERROR "CNN_EXT_CUDA=on, but ${CNN_EXT_CUDA_REASON}")
  endif()
endif()

if(CNN_EXT_HAS_CUDA)
  list(SORT CNN_EXT_CUDA_ARCHS COMPARE NATURAL)
  list(TRANSFORM CNN_EXT_CUDA_ARCHS APPEND "-real" OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)
  list(GET CNN_EXT_CUDA_ARCHS -1 newest)
  list(APPEND CMAKE_CUDA_ARCHITECTURES "${newest}-virtual")
  list(JOIN CNN_EXT_CUDA_ARCHS " " CNN_EXT_CUDA_ARCH_WORDS)

  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)

  # The kernels. The assembler's figures of each source are kept beside its object, for the target cuda_resources and the tests.
  find_package(Python REQUIRED COMPONENTS Interpreter)
  file(GLOB CUDA_KERNEL_SOURCES CONFIGURE_DEPENDS csrc/cuda/*.cu)
  add_library(cnn_ext_cuda_kernels STATIC ${CUDA_KERNEL_SOURCES})
  target_include_directories(cnn_ext_cuda_kernels PRIVATE csrc)
  target_compile_options(cnn_ext_cuda_kernels PRIVATE -Xptxas=-v -Xcompiler=-Wall,-Wextra
                                                      $<$<BOOL:${CNN_EXT_WERROR}>:-Werror=all-warnings>)
  set(recorder "${Python_EXECUTABLE};${CMAKE_CURRENT_SOURCE_DIR}/cmake/record_ptxas.py")
  set_target_properties(cnn_ext_cuda_kernels PROPERTIES CUDA_COMPILER_LAUNCHER "${recorder}")
  set(CUDA_KERNEL_OBJECTS $<TARGET_OBJECTS:cnn_ext_cuda_kernels>)

  # Those that need Hopper's own instructions are machine code for it alone.
  if("90" IN_LIST CNN_EXT_CUDA_ARCHS OR "90a" IN_LIST CNN_EXT_CUDA_ARCHS)
    file(GLOB SM90A_KERNEL_SOURCES CONFIGURE_DEPENDS csrc/cuda/sm90a/*.cu)
    add_library(cnn_ext_cuda_sm90a OBJECT ${SM90A_KERNEL_SOURCES})
    target_include_directories(cnn_ext_cuda_sm90a PRIVATE csrc)
    target_compile_options(cnn_ext_cuda_sm90a PRIVATE $<TARGET_PROPERTY:cnn_ext_cuda_kernels,COMPILE_OPTIONS>)
    set_target_properties(cnn_ext_cuda_sm90a PROPERTIES CUDA_ARCHITECTURES 90a-real CUDA_COMPILER_LAUNCHER "${recorder}")
    list(APPEND CUDA_KERNEL_OBJECTS $<TARGET_OBJECTS:cnn_ext_cuda_sm90a>)
    set(CNN_EXT_HAS_SM90A TRUE)
  endif()

  set(CNN_EXT_CUDA_RESOURCES "${CMAKE_CURRENT_BINARY_DIR}/_cuda_resources.txt")
  add_custom_command(OUTPUT "${CNN_EXT_CUDA_RESOURCES}"
                     COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/cmake/cuda_resources.py"
                             "${CNN_EXT_CUDA_RESOURCES}" ${CUDA_KERNEL_OBJECTS}
                     DEPENDS ${CUDA_KERNEL_OBJECTS} cmake/cuda_resources.py
                     COMMAND_EXPAND_LISTS VERBATIM)
  add_custom_target(cuda_resource_table ALL DEPENDS "${CNN_EXT_CUDA_RESOURCES}")
  add_custom_target(cuda_resources COMMAND "${CMAKE_COMMAND}" -E cat "${CNN_EXT_CUDA_RESOURCES}" DEPENDS cuda_resource_table)

  # Everything else is plain C++ and is compiled as such.
  file(GLOB CUDA_SOURCES CONFIGURE_DEPENDS csrc/cuda/*.cpp)
  add_library(cnn_ext_cuda STATIC ${CUDA_SOURCES})
  target_link_libraries(cnn_ext_cuda PRIVATE cnn_ext_options cnn_ext_cuda_kernels PUBLIC CUDA::cudart_static)
  if(CNN_EXT_HAS_SM90A)
    target_sources(cnn_ext_cuda PRIVATE $<TARGET_OBJECTS:cnn_ext_cuda_sm90a>)
    target_compile_definitions(cnn_ext_cuda PRIVATE CNN_EXT_HAS_SM90A)
  endif()
  # What has run on a GPU is written down where the benchmarks put it.
  include(cmake/proven_rows.cmake)
  set(proof "${CMAKE_CURRENT_SOURCE_DIR}/benchmarks/results/rows_cuda.json")
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${proof}")
  cnn_ext_proven_rows("${proof}" CNN_EXT_CUDA_PROVEN_ROWS)
  target_compile_definitions(cnn_ext_cuda PRIVATE CNN_EXT_CUDA_ARCHS="${CNN_EXT_CUDA_ARCH_WORDS}"
                                                  CNN_EXT_CUDA_PROVEN_ROWS="${CNN_EXT_CUDA_PROVEN_ROWS}")

  if(CNN_EXT_PYTHON)
    pybind11_add_module(_cuda MODULE NO_EXTRAS csrc/bindings/cuda.cpp)
    target_include_directories(_cuda PRIVATE csrc)
    target_link_libraries(_cuda PRIVATE cnn_ext_cuda)
    # The runtime's symbols stay inside: torch may bring another one.
    target_link_options(_cuda PRIVATE -Wl,--exclude-libs,ALL)
    target_compile_definitions(_cuda PRIVATE CNN_EXT_SOURCE_HASH="${CNN_EXT_SOURCE_HASH}"
                                             CNN_EXT_CUDA_TOOLKIT="${CMAKE_CUDA_COMPILER_VERSION}")
    install(TARGETS _cuda DESTINATION .)
    install(FILES "${CNN_EXT_CUDA_RESOURCES}" DESTINATION .)
  endif()
endif()
