"""How fast and how safe the gateway is, beside vLLM alone."""
