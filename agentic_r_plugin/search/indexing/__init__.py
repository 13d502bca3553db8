"""Building what a search backend opens: `agentic-r index`, `index --adopt`, `repair`, Milvus collections."""
