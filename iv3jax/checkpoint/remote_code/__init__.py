"""What an exported InternVideo3 folder carries for transformers, and what names it there.

The other files here are copied into the folder as they are and run from there: they import only each
other, torch, transformers, numpy, Pillow and PyAV, never iv3jax. Nothing imports them here.
"""

from pathlib import Path
from typing import Any

from iv3jax.models.config import ModelConfig

FOLDER = Path(__file__).parent
"""Where the files lie."""

ARCHITECTURES = {
    "internvideo3": "InternVideo3ForConditionalGeneration",
    "internvideo3_text": "InternVideo3ForCausalLM",
}
"""What config.json's `architectures` lists, for each model type that needs this code."""

_TEXT_FILES = (
    "configuration_internvideo3.py",
    "decoder_internvideo3.py",
    "attention_internvideo3.py",
    "positions_internvideo3.py",
)

FILES = {
    "internvideo3": (
        *_TEXT_FILES,
        "modeling_internvideo3.py",
        "processing_internvideo3.py",
        "media_internvideo3.py",
    ),
    "internvideo3_text": _TEXT_FILES,
}
"""The files to copy."""

AUTO_MAP = {
    "internvideo3": {
        "AutoConfig": "configuration_internvideo3.InternVideo3Config",
        "AutoModel": "modeling_internvideo3.InternVideo3Model",
        "AutoModelForCausalLM": f"modeling_internvideo3.{ARCHITECTURES['internvideo3']}",
        "AutoModelForImageTextToText": f"modeling_internvideo3.{ARCHITECTURES['internvideo3']}",
        "AutoProcessor": "processing_internvideo3.InternVideo3Processor",
    },
    "internvideo3_text": {
        "AutoConfig": "configuration_internvideo3.InternVideo3TextConfig",
        "AutoModel": "decoder_internvideo3.InternVideo3TextModel",
        "AutoModelForCausalLM": f"decoder_internvideo3.{ARCHITECTURES['internvideo3_text']}",
    },
}
"""config.json's `auto_map`."""

PROCESSOR_CONFIG: dict[str, Any] = {
    "processor_class": "InternVideo3Processor",
    "auto_map": {"AutoProcessor": AUTO_MAP["internvideo3"]["AutoProcessor"]},
}
"""processor_config.json. Sizes and frame rates are not in it: the processor reads them from the two files
that `iv3jax.data.processor.Processor.save` writes, so that they are stated once."""

CHAT_TEMPLATE = """\
{%- set count = namespace(image=0, video=0) -%}
{%- for message in messages -%}
    {%- if message.role not in ["system", "user", "assistant"] -%}
        {{- raise_exception("role " ~ message.role ~ " is not one of system, user, assistant") -}}
    {%- endif -%}
    {{- "<|im_start|>" ~ message.role ~ "\\n" -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == "image" -%}
                {%- set count.image = count.image + 1 -%}
                {{- "Picture " ~ count.image ~ ": " if add_vision_id else "" -}}
                {{- "<|vision_start|><|image_pad|><|vision_end|>" -}}
            {%- elif part.type == "video" -%}
                {%- set count.video = count.video + 1 -%}
                {{- "Video " ~ count.video ~ ": " if add_vision_id else "" -}}
                {{- "<|vision_start|><|video_pad|><|vision_end|>" -}}
            {%- elif part.type == "text" -%}
                {{- part.text -}}
            {%- else -%}
                {{- raise_exception("a part of type " ~ part.type ~ " is not text, image or video") -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- "<|im_end|>\\n" -}}
{%- endfor -%}
{{- "<|im_start|>assistant\\n" if add_generation_prompt else "" -}}
"""
"""chat_template.jinja. With `add_vision_id` images and videos are numbered, as in `data.chat.render`."""


def tokenizer_config(config: ModelConfig) -> dict[str, Any]:
    """tokenizer_config.json: tokenizer.json is used as it is, and prompts are padded on the left."""
    return {
        # Any other class would rebuild the tokenizer by its own rules.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": PROCESSOR_CONFIG["processor_class"],
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": config.text_config.max_position_embeddings,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
    }
