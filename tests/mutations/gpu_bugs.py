"""Bugs that only a GPU shows: graphs, copies, cuDNN, tensors of more than 2^31 elements."""

from mutations.mutation import Mutation

REPLAY = (
    "test_graphs.py::test_a_replayed_graph_gives_the_bits_of_the_eager_pass_and_waits_for_nothing"
)
ADDRESSES = "test_graphs.py::test_gradients_and_adapters_at_new_addresses_are_noticed"
CUDNN_REPLAY = "test_graphs.py::test_cudnn_attention_is_replayed_as_it_is_launched"
OFFLOADED = "test_graphs.py::test_offloading_and_tiles_within_graphs_change_nothing"
IN_FLIGHT = (
    "test_graphs.py::test_an_offloaded_tensor_stays_until_it_is_copied_however_long_that_takes"
)
COMPUTED = (
    "test_graphs.py::test_a_tensor_is_offloaded_after_it_was_computed_however_long_that_takes"
)
CUDNN = "test_kernels_attention.py::test_cudnn_holds_the_bound_and_mixes_with_the_kernels"
LARGE = (
    "test_kernels_dequantize_ggml.py::"
    "test_weights_of_more_than_two_billion_values_are_dequantised_to_their_end"
)

GPU_BUGS = (
    Mutation(
        "a replayed graph reads the inputs of its capture",
        "minitune/training/cuda_graphs.py",
        "            captured.inputs.copy_(inputs)\n",
        "",
        (REPLAY,),
        gpu=True,
    ),
    Mutation(
        "a graph is replayed although gradients have moved",
        "minitune/training/cuda_graphs.py",
        "if captured is not None and captured.pointers == self._passes.captured_pointers():",
        "if captured is not None:",
        (ADDRESSES,),
        gpu=True,
    ),
    Mutation(
        "graphs of samples of one length serve all samples",
        "minitune/training/cuda_graphs.py",
        "key = CaptureKey(size, **self._passes.model.layer_context.attention_kwargs(packed))",
        "key = CaptureKey(size, None, None)",
        (CUDNN_REPLAY,),
        gpu=True,
    ),
    Mutation(
        "copies to the host do not wait for the layer",
        "minitune/memory/offload.py",
        "            self._stream.wait_stream(torch.cuda.current_stream())\n",
        "            pass\n",
        (COMPUTED,),
        gpu=True,
    ),
    Mutation(
        "backward does not wait for the copies from the host",
        "minitune/memory/offload.py",
        "            torch.cuda.current_stream().wait_stream(self._stream)\n",
        "            pass\n",
        (OFFLOADED, IN_FLIGHT),
        gpu=True,
    ),
    Mutation(
        "tensors are freed before they are copied",
        "minitune/memory/offload.py",
        "torch.cuda.current_stream().wait_event(oldest.copied)",
        "oldest.copied.query()",
        (IN_FLIGHT,),
        gpu=True,
    ),
    Mutation(
        "cuDNN's parts take the query heads of the first group",
        "kernels/attention_cudnn.py",
        "yield slice(first * H // G, last * H // G), slice(first, last)",
        "yield slice(0, (last - first) * H // G), slice(first, last)",
        (CUDNN,),
        gpu=True,
    ),
    Mutation(
        "offsets of blocks overflow 32 bit",
        "kernels/dequantize_ggml.py",
        "blocks_ptr += (first // BLOCK_PARTS).to(tl.int64) * BLOCK_BYTES",
        "blocks_ptr += (first // BLOCK_PARTS) * BLOCK_BYTES",
        (LARGE,),
        gpu=True,
    ),
)
