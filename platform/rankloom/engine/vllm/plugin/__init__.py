"""A folder for the import path of vLLM's processes: `rankloom_vllm`, and beside it what makes vLLM find it."""
