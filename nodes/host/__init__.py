"""The only place in the pack that imports the host (`comfy.*`, `folder_paths`, `server`)."""
