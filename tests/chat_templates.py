"""Chat templates with the constraints of real ones, each as small as shows them. Written for the tests."""

MISTRAL = """
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set rest = messages %}{% endif %}
{%- set users = rest | selectattr('role', 'equalto', 'user') | list %}
{%- set ns = namespace(n=0) %}
{%- for m in rest if not (m.role == 'tool' or m.tool_calls is defined) %}
    {%- if (m.role == 'user') != (ns.n % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {%- set ns.n = ns.n + 1 %}
{%- endfor %}
{{- '<s>' }}
{%- for m in rest %}
    {%- if m.role == 'user' %}
        {%- if tools and m == users[-1] %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
        {{- '[INST]' + (system + '\\n\\n' if loop.last and system is defined else '') + m.content + '[/INST]' }}
    {%- elif m.tool_calls is defined %}
        {{- '[TOOL_CALLS][' }}
        {%- for c in m.tool_calls %}
            {%- if c.id is not defined or c.id | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}
            {{- (c.function | tojson)[:-1] + ', "id": "' + c.id + '"}' + ('' if loop.last else ', ') }}
        {%- endfor %}]</s>
    {%- elif m.role == 'assistant' %}{{ m.content + '</s>' }}
    {%- elif m.role == 'tool' %}
        {%- if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}
            {{- raise_exception('ids have length 9') }}
        {%- endif %}
        {{- '[TOOL_RESULTS]{"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}{{ raise_exception('only user and assistant roles') }}
    {%- endif %}
{%- endfor %}"""

MINISTRAL = MISTRAL.replace(
    "{%- elif m.role == 'assistant' %}",
    "{%- elif m.role == 'assistant' %}{% if not m.content %}{{ raise_exception('no content') }}{% endif %}",
)

GEMMA = """<bos>
{%- if messages[0].role == 'system' %}{{ raise_exception('system role not supported') }}{% endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim }}
    {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}<start_of_turn>model\n{% endif %}"""

LLAMA3 = """<|begin_of_text|>
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system }}{{ tools | tojson if tools else '' }}<|eot_id|>
{%- for m in messages %}
    {%- if 'tool_calls' in m %}
        {%- if m.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls at once') }}{% endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", ' }}
        {{- '"parameters": ' + call.arguments | tojson + '}<|eot_id|>' }}
    {%- elif m.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content | tojson + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

QWEN3 = """
{%- if tools %}{{ '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
    {{- '<tools>' }}{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}{{ '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if m.reasoning_content is string and m.reasoning_content %}
            {{- '<think>\\n' + m.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- m.content }}
        {%- for c in m.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' }}
            {{- c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}<|im_end|>\n
    {%- elif m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

QWEN35 = """
{%- for m in messages %}
    {%- if m.role == 'system' and not loop.first %}{{ raise_exception('the system message comes first') }}{% endif %}
{%- endfor %}""" + QWEN3.replace(
    "'<|im_start|>assistant\\n' }}\n    {%- if enable", "'<|im_start|>assistant\\n<think>\\n' }}\n    {%- if enable"
)

COMMAND_R = """
{%- set ns = namespace(n=0) %}<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>
{%- for tool in tools or [] %}{{ tool.function.name + tool.function.parameters | tojson }}{% endfor %}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}<|END_OF_TURN_TOKEN|>
{%- for m in messages %}
    {%- if m.role == 'system' and not loop.first %}
        {{- '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + m.content + '<|END_OF_TURN_TOKEN|>' }}
    {%- elif m.role == 'user' %}<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{{ m.content }}<|END_OF_TURN_TOKEN|>
    {%- elif m.role == 'assistant' %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>
        {%- if m.tool_calls %}<|START_THINKING|>{{ m.reasoning_content }}<|END_THINKING|><|START_ACTION|>[
            {%- for c in m.tool_calls %}
                {{- '{"tool_call_id": "' ~ ns.n ~ '", "tool_name": "' + c.function.name + '", "parameters": ' }}
                {{- c.function.arguments | tojson + '}' }}{% set ns.n = ns.n + 1 %}
            {%- endfor %}]<|END_ACTION|>
        {%- else %}<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>{% endif %}<|END_OF_TURN_TOKEN|>
    {%- elif m.role == 'tool' %}
        {{- '<|START_TOOL_RESULT|>' + m.tool_call_id + m.content | tojson + '<|END_TOOL_RESULT|>' }}
    {%- endif %}
{%- endfor %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"""

DEEPSEEK = """
{%- if thinking is not defined %}{% set thinking = false %}{% endif %}
{%- set ns = namespace(system='', tool=false) %}
{%- for m in messages if m.role == 'system' %}{% set ns.system = ns.system + m.content %}{% endfor %}
{{- '<BOS>' + ns.system }}{% if tools %}{{ tools | tojson }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ '<User>' + m.content }}
    {%- elif m.role == 'assistant' and m.tool_calls %}
        {{- '<Assistant></think>' + m.content + '<calls>' }}
        {%- for c in m.tool_calls %}
            {{- '<call>' + c.function.name + '<sep>' + c.function.arguments + '</call>' }}
        {%- endfor %}
        {{- '</calls><EOS>' }}
    {%- elif m.role == 'assistant' %}{{ '<Assistant></think>' + m.content + '<EOS>' }}
    {%- elif m.role == 'tool' %}{{ '<output>' + m.content + '</output>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<Assistant>' + ('<think>' if thinking else '</think>') }}{% endif %}"""

PHI4 = """
{%- for m in messages %}
    {%- if m.role == 'system' and 'tools' in m and m.tools is not none %}
        {{- '<|system|>' + m.content + '<|tool|>' + m.tools + '<|/tool|><|end|>' }}
    {%- else %}{{ '<|' + m.role + '|>' + m.content }}
        {%- if m.tool_calls %}<|tool_call|>[
            {%- for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}]<|/tool_call|>
        {%- endif %}
        {{- '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

GRANITE = """
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set system = 'You are Granite.' %}{% set rest = messages %}{% endif %}
{%- if tools %}{% set rest = [{'role': 'available_tools', 'content': tools | tojson}] + rest %}{% endif %}
{%- if thinking %}{% set system = system + ' Write between <think></think> and <response></response>.' %}{% endif %}
{%- for m in [{'role': 'system', 'content': system}] + rest %}
    {{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""

LFM2 = """
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- if tools %}{% set system = system + '<|tool_list_start|>' + tools | tojson + '<|tool_list_end|>' %}{% endif %}
{%- if system %}{{ '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}{% endif %}
{%- for m in (messages[1:] if messages[0].role == 'system' else messages) %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {{- '<|tool_response_start|>' + m.content + '<|tool_response_end|>' if m.role == 'tool' else m.content }}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

CHATML = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

MINIMAX = """
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set system = 'You are helpful.' %}{% set rest = messages %}{% endif %}
{{- ']~b]system\\n' + system }}{% if tools %}{{ tools | tojson }}{% endif %}[e~[
{%- set last = namespace(call=none) %}
{%- for m in rest %}
    {%- if m.role == 'assistant' %}
        {{- ']~b]ai\\n' }}{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}
        {{- m.content }}
        {%- set last.call = none %}
        {%- for c in m.tool_calls or [] %}
            {{- '<invoke name="' + c.function.name + '">' }}
            {%- for k, v in c.function.arguments.items() %}{{ '<parameter name="' + k + '">' ~ v }}{% endfor %}
            {%- set last.call = c.function.name %}
        {%- endfor %}[e~[
    {%- elif m.role == 'tool' %}
        {%- if last.call is none %}{{ raise_exception('no previous assistant message with a tool call') }}{% endif %}
        {{- ']~b]tool\\n<response>' + m.content + '</response>[e~[' }}
    {%- elif m.role == 'user' %}{{ ']~b]user\\n' + m.content + '[e~[' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ ']~b]ai\\n<think>\\n' }}{% endif %}"""

GPT_OSS = """<|start|>system<|message|>Reasoning: {{ reasoning_effort | default('medium') }}<|end|>
{%- if messages[0].role == 'system' %}{% set dev = messages[0].content %}{% set messages = messages[1:] %}{% endif %}
{%- if dev or tools %}
    {{- '<|start|>developer<|message|>' + (dev or '') }}{{ tools | tojson if tools else '' }}<|end|>
{%- endif %}
{%- set last = namespace(name=none) %}
{%- for m in messages %}
    {%- if m.role == 'assistant' and 'tool_calls' in m %}
        {%- if m.content and m.thinking %}{{ raise_exception('not both content and thinking') }}{% endif %}
        {%- if m.content or m.thinking %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + (m.content or m.thinking) + '<|end|>' }}
        {%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start|>assistant to=functions.' + call.name + '<|message|>' + call.arguments | tojson + '<|call|>' }}
        {%- set last.name = call.name %}
    {%- elif m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
        {%- set last.name = none %}
    {%- elif m.role == 'tool' %}
        {%- if last.name is none %}{{ raise_exception('Message has tool role, but there was no call') }}{% endif %}
        {{- '<|start|>functions.' + last.name + '<|message|>' + m.content | tojson + '<|end|>' }}
    {%- elif m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""

KIMI = """
{%- if tools %}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{% endif %}
{%- for m in messages %}
    {{- '<|im_' + m.role + '|>' + (m.name if m.name else m.role) + '<|im_middle|>' }}
    {%- if m.role == 'tool' %}{{ '## Return of ' + m.tool_call_id + '\\n' }}{% endif %}
    {{- m.content }}
    {%- for c in m.tool_calls or [] %}
        {{- '<|tool_call_begin|>' + c.id + '<|tool_call_argument_begin|>' + c.function.arguments | tojson }}
        {{- '<|tool_call_end|>' }}
    {%- endfor %}<|im_end|>
{%- endfor %}
{%- if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"""

PARTS = """
{%- for m in messages %}{{ m.role + ':' }}
    {%- for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ ';' }}
{%- endfor %}"""

ALL = {
    name.lower(): template
    for name, template in globals().copy().items()
    if name.isupper() and isinstance(template, str)
}
