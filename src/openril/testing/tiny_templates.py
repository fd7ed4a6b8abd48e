"""Chat templates that follow each family. A message's content is a string, or a list of image and text parts."""

# ChatML of Qwen and InternVL. IMAGE is replaced by the family's mark.
CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ 'IMAGE' }}{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

# LLaVA-OneVision's ChatML: all images of a turn first, then each text on its own line, and no line break between turns.
IMAGES_FIRST = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + ' ' }}
{%- if message['content'] is string -%}
{{ '\\n' + message['content'] }}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>' }}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{ '\\n' + part['text'] }}{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

# SmolVLM: one mark for the start of the whole text, then "User:" and "Assistant:".
UTTERANCES = """\
{{ '<|im_start|>' }}
{%- for message in messages -%}
{{ message['role'] | capitalize + ':' }}
{%- if message['content'] is string -%}
{{ ' ' + message['content'] }}
{%- else -%}
{%- if message['content'][0]['type'] != 'image' -%}{{ ' ' }}{%- endif -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<image>' }}{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<end_of_utterance>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"""

# Gemma 3: the assistant is "model", and a system message is the beginning of the first user turn.
TURNS = """\
{{ '<bos>' }}
{%- set state = namespace(system='') -%}
{%- for message in messages -%}
{%- set text = namespace(all='') -%}
{%- if message['content'] is string -%}
{%- set text.all = message['content'] | trim -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- set text.all = text.all + ('<start_of_image>' if part['type'] == 'image' else part['text'] | trim) -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'system' -%}
{%- set state.system = text.all + '\\n\\n' -%}
{%- else -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\\n' + state.system + text.all + '<end_of_turn>\\n' }}
{%- set state.system = '' -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""
