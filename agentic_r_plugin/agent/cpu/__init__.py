"""verl on a machine without an accelerator: platform, engine fixes, and a rollout engine on Hugging Face models.

Nothing here is imported, and nothing in verl is touched, where an accelerator is found (`detect.cpu_wanted`).
"""
