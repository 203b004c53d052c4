"""Decoding in processes whose memory is limited, page cache included: streamed, plainly mapped, and by llama.cpp."""
