# The one place that maps an instruction set to compiler flags. Only the sources under csrc/cpu/kernels get them; everything else is compiled
# for the plainest processor of the platform.
set(CNN_EXT_ISAS baseline)
set(CNN_EXT_FLAGS_baseline "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND CNN_EXT_ISAS avx2 avx512)
  set(CNN_EXT_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(CNN_EXT_FLAGS_avx512 -mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl)
  # Beside these, baseline has the rows alone that serve every shape: those that csrc/cpu/kernel_table.cpp does not call special.
  set(CNN_EXT_BASELINE_KERNELS
      adaptive_avg_pool2d adaptive_max_pool2d avg_pool2d_backward avg_pool2d_forward conv2d_backward_bias_direct conv2d_backward_weight_direct
      conv2d_backward_weight_padded conv2d_backward_weight_tile conv2d_converted conv2d_depthwise conv2d_depthwise_weight conv2d_direct
      conv2d_direct_channel_tile conv2d_relu_max_pool2d_backward_bias
      fma_peak max_pool2d_backward max_pool2d_forward max_pool2d_gather max_unpool2d pool2d_converted)
endif()

# Sources of rows for 16 registers of 32 bytes, which nothing but avx2 has.
set(CNN_EXT_AVX2_KERNELS conv2d_backward_weight_planes conv2d_depthwise_rows conv2d_pointwise_weight conv2d_short_sums
    max_pool2d_backward_in_place)

# GCC's passes that took a quarter of the time and gave the kernels nothing: their loops are unrolled and their registers chosen by hand, so that
# there are no jumps to thread, no ranges to narrow, no common expressions to find and no order of instructions to improve.
# (The rows for the matrix unit keep them: they take little time, and whether they gain by them is not clear.)
set(CNN_EXT_FEWER_PASSES $<$<CXX_COMPILER_ID:GNU>:-fno-thread-jumps -fno-tree-vrp -fno-gcse -fno-schedule-insns2>)
set(CNN_EXT_KERNEL_OPTIONS -fno-exceptions -fno-predictive-commoning)

# Those that take longest to compile come first, in the largest vectors: Ninja begins with what comes first, and at the end nothing large is
# waited for alone.
set(CNN_EXT_LARGE_KERNELS conv2d_relu_max_pool2d_winograd conv2d_pointwise conv2d_depthwise_planes conv2d_depthwise_planes_weight conv2d_depthwise
    conv2d_relu_max_pool2d_direct conv2d_direct conv2d_direct_pixels conv2d_winograd max_pool2d_forward_strips)

# Rows for the matrix unit (AMX) have sources of their own, compiled once, where the compiler knows it; they are the rows of avx512_bf16.
set(CNN_EXT_FLAGS_amx ${CNN_EXT_FLAGS_avx512} -mavx512bf16 -mamx-tile -mamx-bf16)
if("avx512" IN_LIST CNN_EXT_ISAS)
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag("-mavx512bf16 -mamx-tile -mamx-bf16" CNN_EXT_HAS_AMX)
endif()

function(cnn_ext_add_amx_objects target sources)
  add_library(${target}_amx OBJECT ${sources})
  target_link_libraries(${target}_amx PRIVATE cnn_ext_options)
  target_compile_definitions(${target}_amx PRIVATE CNN_EXT_ISA=avx512_bf16)
  target_compile_options(${target}_amx PRIVATE -O3 ${CNN_EXT_FLAGS_amx} ${CNN_EXT_KERNEL_OPTIONS})
  target_sources(${target} INTERFACE $<TARGET_OBJECTS:${target}_amx>)
  target_compile_definitions(${target} PRIVATE CNN_EXT_HAS_AMX)
endfunction()

# Compiles each source once per instruction set that has its rows, with CNN_EXT_ISA naming it, and gives the objects to whatever links the target.
function(cnn_ext_add_isa_objects target sources)
  list(JOIN CNN_EXT_LARGE_KERNELS "|" large)
  set(large_sources ${sources})
  list(FILTER large_sources INCLUDE REGEX "/(${large})\\.cpp$")
  list(PREPEND sources ${large_sources})
  list(REMOVE_DUPLICATES sources)
  # Winograd's transforms and products are unrolled in the source: -O2 makes the same of them, in three quarters of the time.
  set(winograd_sources ${sources})
  list(FILTER winograd_sources INCLUDE REGEX "winograd")
  set_source_files_properties(${winograd_sources} PROPERTIES COMPILE_OPTIONS -O2)
  set(isas ${CNN_EXT_ISAS})
  list(REVERSE isas)
  foreach(isa IN LISTS isas)
    set(sources_of_isa ${sources})
    set(level -O3)
    if(NOT isa STREQUAL "avx2")
      list(JOIN CNN_EXT_AVX2_KERNELS "|" kernels)
      list(FILTER sources_of_isa EXCLUDE REGEX "/(${kernels})\\.cpp$")
    endif()
    if(isa STREQUAL "baseline" AND CNN_EXT_BASELINE_KERNELS)
      list(JOIN CNN_EXT_BASELINE_KERNELS "|" kernels)
      list(FILTER sources_of_isa INCLUDE REGEX "/(${kernels})\\.cpp$")
      set(level -O2) # faster to compile, as it is for the naive rows; better sets serve where speed matters
    endif()
    add_library(${target}_${isa} OBJECT ${sources_of_isa})
    target_link_libraries(${target}_${isa} PRIVATE cnn_ext_options)
    target_compile_definitions(${target}_${isa} PRIVATE CNN_EXT_ISA=${isa})
    target_compile_options(${target}_${isa} PRIVATE ${level} ${CNN_EXT_FLAGS_${isa}} ${CNN_EXT_FEWER_PASSES} ${CNN_EXT_KERNEL_OPTIONS})
    # Reading the intrinsics takes half the time of a small source. (Compiler caches pass over what has a precompiled header.)
    if(NOT isa STREQUAL "baseline" AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
      target_precompile_headers(${target}_${isa} PRIVATE <immintrin.h>)
    endif()
    target_sources(${target} INTERFACE $<TARGET_OBJECTS:${target}_${isa}>)
  endforeach()
endfunction()
