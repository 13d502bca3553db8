"""verl on a machine without an accelerator: platform, engine fixes, and a rollout engine on Hugging Face models.

If an accelerator is found (`detect.cpu_wanted`), none of these modules is imported and verl is not modified.
"""
