"""Registers the extension in Automatic1111, Forge and Forge Neo, which run this file without a package."""

import gradio as gr
import modules.scripts as webui_scripts

from spectral_webui import registration

extension = registration.start()


class SpectralAdaptersScript(webui_scripts.Script):
    """A field for adapters that are added to every prompt; for the API too (``alwayson_scripts``)."""

    def title(self):
        return "Spectral Adapters"

    def show(self, is_img2img):
        return webui_scripts.AlwaysVisible

    def ui(self, is_img2img):
        side = "img2img" if is_img2img else "txt2img"
        with gr.Accordion("Spectral Adapters", open=False):
            lines = gr.Textbox(
                label="Added to every prompt, one adapter to a line",
                placeholder="name:0.8  or  name:te:unet:start=0:stop=0.7:curve=bell",
                lines=2,
                elem_id=f"spectral_adapters_{side}",
            )
        return [lines]

    def process(self, p, lines=""):
        extension.add_tags(p, lines)
