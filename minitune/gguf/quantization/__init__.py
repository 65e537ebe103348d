"""GGUF storage types as tensor operations: quantisers and dequantisers, on the CPU or a GPU."""
