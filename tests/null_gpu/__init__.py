"""A GPU that is not there, so that CUDA code is tested on machines without one.

`null.c` stands in for the CUDA runtime, cuBLAS and NCCL: device memory is host memory and kernels do nothing; all the
rest is PyTorch's real CUDA code. `computed.py` does every operation again on the CPU in the "GPU's" memory, so that
whole commands run "on cuda:0" with the CPU's numbers, to the last bit in float32.

    python -m tests.null_gpu training pretrain RECIPE ...          any command of ours, computed
    python -m tests.null_gpu --idle training pretrain RECIPE ...   nothing computed: who waits for the GPU, by line

It shows crashes, tensors on the wrong device, waits for the GPU, peaks of memory, and ranks on the wrong GPU. It cannot
show kernels, time on a GPU, races, or what NCCL does beside the computation. The variables of its environment are at
the head of `null.c`. Made for PyTorch 2.15; another one may want other stubs.
"""
