"""chat:PATH of collect.py. Each test names the bug that it would show."""
import argparse
import gzip
import json
import time
import tracemalloc
import zlib
from collections import Counter
from pathlib import Path

import pytest

import collect
from conftest import run
from collect import FORMATS, Record, check_conversation, python_calls, read_values, recognise, value_records

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TRAJECTORIES = DATA / "trajectories"
needs_data = pytest.mark.skipif(not TRAJECTORIES.exists(), reason="the shared trajectories are not on this machine")


def chat_records(path, name, license, form=None):
    return value_records(read_values(path), f"chat:{name}", license, form=form)


def converted(tmp_path, value, **options):
    """(messages, tools) of a file with one record."""
    path = tmp_path / ("one.txt" if isinstance(value, str) else "one.jsonl")
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    (record,) = chat_records(path, "one", "MIT", **options)
    assert isinstance(record, Record), record
    assert Record.from_json(record.to_json()).messages == record.messages
    return record.messages, record.tools


def brief(messages):
    """One line for each message: "role: (thought) content name(argument=value)"."""
    def call(function):
        return f" {function['name']}({', '.join(f'{k}={v!r}' for k, v in json.loads(function['arguments']).items())})"
    return [f"{m['role']}: " + (f"({m['reasoning_content']}) " if "reasoning_content" in m else "") + m["content"] + "".join(call(c["function"]) for c in m.get("tool_calls", ())) for m in messages]


def schema(tools, name):
    return next(t["function"]["parameters"] for t in tools if t["function"]["name"] == name)


def m(role, content, **more):
    return {"role": role, "content": content, **more}


def s(who, value):
    return {"from": who, "value": value}


def node(kind, description, *children):
    return {"node_type": kind, "description": description, "observation": f"to {description}", "children": list(children)}


# What one would write by hand for a record of each format: (format, record, conversation)
WEATHER = {"name": "weather", "description": "Weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}
CALL = '{"name": "weather", "arguments": {"city": "Rome"}}'
CASES = {
    "openai tool_calls, ids kept": ("messages", {"messages": [
        {"role": "user", "content": [{"type": "text", "text": "Rome?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": ""}], "reasoning_content": "Hm.", "tool_calls": [
            {"id": "x9", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}},
            {"id": "x8", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]},
        {"role": "tool", "tool_call_id": "x8", "content": "snow"}, {"role": "tool", "tool_call_id": "x9", "content": "sun"}]},
        ["user: Rome?", "assistant: (Hm.)  weather(city='Rome') weather(city='Oslo')", "tool: snow", "tool: sun"]),
    "openai function_call": ("messages", {"messages": [
        m("user", "Rome?"), m("assistant", "I look.", function_call=json.loads(CALL)),
        {"role": "function", "name": "weather", "content": "sun"}, m("assistant", "Sun.")], "functions": [WEATHER]},
        ["user: Rome?", "assistant: I look. weather(city='Rome')", "tool: sun", "assistant: Sun."]),
    "hermes": ("messages", {"conversations": [
        s("system", f"Use these.\n<tools>\n{json.dumps({'type': 'function', 'function': WEATHER})}\n</tools>"),
        s("human", "Rome?"), s("gpt", f"<think>hm</think>\n<tool_call>\n{CALL}\n</tool_call>"),
        s("tool", "<tool_response>\nsun\n</tool_response>"), s("gpt", "Sun.")]},
        [None, "user: Rome?", "assistant: (hm)  weather(city='Rome')", "tool: sun", "assistant: Sun."]),
    "sharegpt roles": ("messages", {"system": "Help.", "tools": json.dumps([WEATHER]), "conversations": [
        s("human", "Rome?"), s("function_call", CALL), s("function_response", "sun"), s("gpt", "Sun. Action: none.")]},
        ["system: Help.", "user: Rome?", "assistant:  weather(city='Rome')", "tool: sun", "assistant: Sun. Action: none."]),
    "glaive v2": ("glaive", {"system": f"SYSTEM: You may call -\n{json.dumps(WEATHER, indent=4)}\n", "chat":
        "USER: What's on in Rome?\n\n\nASSISTANT: Let me see. <functioncall> "
        "{\"name\": \"weather\", \"arguments\": '{\"city\": \"L'Aquila\"}'} <|endoftext|>\n\n\n"
        "FUNCTION RESPONSE: {\"sky\": \"sun\"}\n\n\nASSISTANT: Sun. <|endoftext|>\n"},
        [None, "user: What's on in Rome?", "assistant: Let me see. weather(city=\"L'Aquila\")", 'tool: {"sky": "sun"}',
         "assistant: Sun."]),
    "xlam": ("xlam", {"query": "Rome?", "tools": json.dumps([{"name": "weather", "description": "", "parameters": {
        "city": {"type": "str", "description": "where"}, "days": {"type": "int, optional", "default": 1}}}]),
            "answers": f"[{CALL}, {CALL}]"},
        ["user: Rome?", "assistant:  weather(city='Rome') weather(city='Rome')"]),
    "toolace": ("toolace", {"system": f"Functions in JSON:\n[{json.dumps(WEATHER)}]\nReturn [f(a=1)].", "conversations": [
        s("user", "Rome?"), s("assistant", '[Sky API(city="Rome), x(", n=[1, -2.5], deep={"a": True}), b.c()]'),
        s("tool", "[1]"), s("assistant", "[Note] Sun (warm).")]},
        [None, "user: Rome?", "assistant:  Sky API(city='Rome), x(', n=[1, -2.5], deep={'a': True}) b.c()", "tool: [1]",
         "assistant: [Note] Sun (warm)."]),
    "toolbench text": ("react", {"conversations": [
        s("system", "You have access to the following APIs: [{'name': 'weather', 'description': \"It's\", 'parameters': {}}]"),
        s("user", "Rome?"), s("assistant", '\nThought: I ask.\nAction: weather\nAction Input: {\n "city": "Rome"\n}'),
        s("function", "sun"), s("assistant", 'Thought: Done.\nAction: Finish\nAction Input: {"final_answer": "Sun"}')]},
        [None, "user: Rome?", "assistant: I ask. weather(city='Rome')", "tool: sun",
         "assistant: Done. Finish(final_answer='Sun')"]),
    "agent data protocol": ("agent_data_protocol", {"id": "1", "content": [
        {"class_": "text_observation", "content": "Rome?", "source": "user"},
        {"class_": "api_action", "function": "weather", "kwargs": {"city": "Rome"}, "description": "I ask."},
        {"class_": "text_observation", "content": "sun", "source": "environment"},
        {"class_": "code_action", "language": "bash", "content": "ls", "description": None},
        {"class_": "text_observation", "content": "a.txt", "source": "environment"},
        {"class_": "message_action", "content": "Sun."}]},
        ["user: Rome?", "assistant: I ask. weather(city='Rome')", "tool: sun", "assistant:  bash(command='ls')", "tool: a.txt",
         "assistant: Sun."]),
    "agentinstruct": ("react", {"conversations": [
        s("human", "Use Act:."), s("gpt", "OK."), s("human", "Count."),
        s("gpt", "Think: I list.\n\nAct: bash\n\n```bash\nls | wc -l\n```"),
        s("human", "The output of the OS:\n3"), s("gpt", "Think: So 3.\n\nAct: answer(3)"),
        s("human", "Next."), s("gpt", "THOUGHT: Go.\nACTION: go to bed 1"),
        s("human", "You see."), s("gpt", "Thought: kg\nAction: get_neighbors(m.0, a.b)"),
        s("human", "x"), s("gpt", "Action: Operation\n```sql\nSELECT 1;\n```"),
        s("human", "[1]"), s("gpt", "Action: Answer\nFinal Answer: [\"1\"]")]},
        ["user: Use Act:.", "assistant: OK.", "user: Count.", "assistant: I list. bash(command='ls | wc -l')",
         "tool: The output of the OS:\n3", "assistant: So 3. answer(answer=3)", "tool: Next.",
         "assistant: Go. act(command='go to bed 1')", "tool: You see.",
         "assistant: kg get_neighbors(variable='m.0', relation='a.b')", "tool: x",
         "assistant:  sql(query='SELECT 1;')", "tool: [1]", "assistant:  Answer(answer='[\"1\"]')"]),
    "codeact": ("codeact", {"conversations": [
        m("user", "1+1?"), m("assistant", "I compute. <execute> print(1+1) </execute>"),
        m("user", "Observation:\n2"), m("assistant", "<solution>2</solution>")]},
        ["user: 1+1?", "assistant: I compute. python(code='print(1+1)')", "tool: 2", "assistant: <solution>2</solution>"]),
    "api-bank": ("api_bank", {
        "instruction": 'API descriptions:\n{"name": "Cancel", "description": "d", "input_parameters": {"id": {"type": "str"}}}',
        "input": "User: Cancel 7.\nAI: Your name?\nUser: Jo\nAPI-Request: [Find(name='Jo')]->{'id': '7'}\nGenerate API Request:",
        "expected_output": "API-Request: [Cancel(id='7')]"},
        [None, "user: Cancel 7.", "assistant: Your name?", "user: Jo", "assistant:  Find(name='Jo')", "tool: {'id': '7'}",
         "assistant:  Cancel(id='7')"]),
    "api-bank dialogue": ("api_bank_dialogue", {"turns": [
        {"role": "User", "text": "Cancel 7."}, {"role": "AI", "text": "I do."},
        {"role": "API", "api_name": "Cancel", "param_dict": {"id": "7"}, "result": {"output": {"ok": True}, "exception": None}},
        {"role": "AI", "text": "Done."}]},
        ["user: Cancel 7.", "assistant: I do. Cancel(id='7')", 'tool: {"ok": true}', "assistant: Done."]),
    "mini-swe-agent": ("mini_swe_agent", {"messages": [m("system", "Answer with ONE bash code block."), m("user", "Fix."),
        m("assistant", "I look.\n\n```bash\nls\n```"), m("user", "<output>a</output>")]},
        [None, "user: Fix.", "assistant: I look. bash(command='ls')", "tool: <output>a</output>"]),
    "toolbench tree, the path to the final answer": ("toolbench_tree", {
        "answer_generation": {"query": "Rome?", "function": [WEATHER], "final_answer": '{"give_answer": 2}'},
        "tree": {"tree": node("Action Input", "",
            node("Thought", "No.", node("Action", "weather", node("Action Input", "{}", node("Action", "Finish", node(
                "Action Input", '{"give_answer": 1}'))))),
            node("Thought", "Yes.", node("Action", "Finish", node("Action Input", '{"give_answer": 2}'))))}},
        ["user: Rome?", "assistant: Yes. Finish(give_answer=2)", 'tool: to {"give_answer": 2}']),
    "openhands": ("openhands", [
        {"source": "user", "action": "message", "args": {"content": "List."}},
        {"source": "agent", "action": "run", "args": {"command": "ls", "thought": "I look.", "blocking": False},
         "tool_call_metadata": {"function_name": "bash", "tool_call_id": "t1", "model_response": {"choices": [{"message": {
             "tool_calls": [{"id": "t1", "function": {"name": "bash", "arguments": '{"command": "ls"}'}}]}}]}}},
        {"source": "agent", "observation": "run", "content": "a.txt", "tool_call_metadata": {"tool_call_id": "t1"}},
        {"source": "environment", "observation": "agent_state_changed", "content": ""},
        {"source": "agent", "action": "finish", "args": {"thought": "a.txt"}}],
        ["user: List.", "assistant: I look. bash(command='ls')", "tool: a.txt", "assistant: a.txt"]),
    "openhands, without metadata": ("openhands", {"instruction": "x", "history": [
        {"content": "List.", "action": "message", "source": "user"}, {"command": "ls", "thought": "I look.", "action": "run"},
        {"content": "a.txt", "command": "ls", "observation": "run"}, {"outputs": {}, "thought": "Done.", "action": "finish"}]},
        ["user: List.", "assistant: I look. run(command='ls')", "tool: a.txt", "assistant: Done."]),
    "traces, any-agent's": ("traces", {"spans": [
        {"start_time": 3, "attributes": {"gen_ai.operation.name": "call_llm", "gen_ai.output": "Sun."}},
        {"start_time": 2, "attributes": {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "weather",
                                         "gen_ai.tool.description": "Weather", "gen_ai.output": "sun"}},
        {"start_time": 1, "attributes": {
            "gen_ai.operation.name": "call_llm", "gen_ai.input.messages": json.dumps([m("user", "Rome?")]),
            "gen_ai.output": '[{"tool.name": "weather", "tool.args": "{\\"city\\": \\"Rome\\"}"}]'}}]},
        ["user: Rome?", "assistant:  weather(city='Rome')", "tool: sun", "assistant: Sun."]),
    "traces, by the convention": ("traces", [{"start_time": 1, "attributes": {
        "gen_ai.input.messages": json.dumps([
            {"role": "user", "parts": [{"type": "text", "content": "Rome?"}]},
            {"role": "assistant", "parts": [{"type": "tool_call", "id": "c", "name": "weather", "arguments": {"city": "Rome"}}]},
            {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c", "response": "sun"}]}]),
        "gen_ai.output.messages": json.dumps([{"role": "assistant", "parts": [{"type": "text", "content": "Sun."}]}])}}],
        ["user: Rome?", "assistant:  weather(city='Rome')", "tool: sun", "assistant: Sun."]),
    "atif": ("atif", {"schema_version": "ATIF-v1.4", "agent": {"name": "a"}, "steps": [
        {"step_id": 1, "source": "user", "message": "Rome?"},
        {"step_id": 2, "source": "agent", "message": "I look.", "reasoning_content": "Hm.", "tool_calls": [
            {"tool_call_id": "c", "function_name": "weather", "arguments": {"city": "Rome"}}],
         "observation": {"results": [{"source_call_id": "c", "content": "sun"}]}},
        {"step_id": 3, "source": "agent", "message": "Sun."}]},
        ["user: Rome?", "assistant: (Hm.) I look. weather(city='Rome')", "tool: sun", "assistant: Sun."]),
    "samples of inspect": ("samples", {"samples": [{"id": 1, "messages": [
        m("user", "Rome?"), m("assistant", "", tool_calls=[{"id": "c", "function": "weather", "arguments": {"city": "Rome"}}]),
        m("tool", "sun", tool_call_id="c", function="weather")], "output": {"choices": []}}]},
        ["user: Rome?", "assistant:  weather(city='Rome')", "tool: sun"]),
    "an evaluation set of adk": ("evaluation_set", {"eval_cases": [{"conversation": [
        {"user_content": {"parts": [{"text": "Rome?", "function_call": None}], "role": "user"}, "intermediate_data": {
            "tool_uses": [{"id": None, "name": "weather", "args": {"city": "Rome"}}], "intermediate_responses": [],
            "tool_responses": [{"name": "weather", "response": {"sky": "sun"}}]}, "final_response": None},
        {"user_content": {"parts": [{"text": "Oslo?"}]}, "intermediate_data": {"invocation_events": [
            {"author": "sky", "content": {"parts": [{"function_call": {"name": "weather", "args": {"city": "Oslo"}}}]}},
            {"author": "sky", "content": {"parts": [{"function_response": {"response": {"sky": "snow"}}}]}}]},
         "final_response": {"parts": [{"text": "Snow."}]}}]}]},
        ["user: Rome?", "assistant:  weather(city='Rome')", 'tool: {"sky": "sun"}', "user: Oslo?",
         "assistant:  weather(city='Oslo')", 'tool: {"sky": "snow"}', "assistant: Snow."]),
    "an older evaluation of adk": ("evaluation_set", [
        {"query": "Rome?", "expected_tool_use": [{"tool_name": "weather", "tool_input": {"city": "Rome"}}], "reference": "Sun.",
         "expected_intermediate_agent_responses": [{"author": "sky", "text": "I looked."}]},
        {"query": "Oslo?", "expected_tool_use": [], "reference": "Snow."}],
        ["user: Rome?", "assistant:  weather(city='Rome')", "assistant: I looked.", "assistant: Sun.", "user: Oslo?", "assistant: Snow."]),
    "simulations of tau2": ("samples", {"simulations": [{"id": "1", "messages": [
        m("assistant", "Hi."), m("user", "Rome?"), m("user", None, tool_calls=[
            {"id": "u", "name": "look_out", "arguments": {}, "requestor": "user"}], requestor="user"),
        m("tool", "rain", id="u", requestor="user"),
        m("assistant", None, tool_calls=[{"id": "c", "name": "weather", "arguments": {"city": "Rome"}}]),
        m("tool", "sun", id="c", requestor="assistant")]}]},
        ["assistant: Hi.", "user: Rome?", "assistant:  weather(city='Rome')", "tool: sun"]),
    "harmony": ("harmony",
        "<|start|>developer<|message|># Tools\n\nnamespace functions {\n\n// Weather\ntype weather = (_: {\ncity: string,\n"
        "}) => any;\n\n}<|end|><|start|>user<|message|>Rome?<|end|><|start|>assistant<|channel|>analysis<|message|>Hm.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{\"city\": \"Rome\"}<|call|>"
        "<|start|>functions.weather to=assistant<|channel|>commentary<|message|>sun<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Sun.<|return|>",
        [None, "user: Rome?", "assistant: (Hm.)  weather(city='Rome')", "tool: sun", "assistant: Sun."]),
    "chatml": ("templated_text", {"text":
        f"<|im_start|>system\n<tools>{json.dumps([WEATHER])}</tools><|im_end|>\n"
        "<|im_start|>user\nRome?<|im_end|>\n"
        f"<|im_start|>assistant\n<think>\nHm.\n</think>\n\n<tool_call>\n{CALL}\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nsun\n</tool_response><|im_end|>\n<|im_start|>assistant\nSun."},
        [None, "user: Rome?", "assistant: (Hm.)  weather(city='Rome')", "tool: sun", "assistant: Sun."]),
    "llama 3": ("templated_text",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nRome?<|eot_id|><|start_header_id|>"
        'assistant<|end_header_id|>\n\n<|python_tag|>weather.call(city="Rome")<|eom_id|><|start_header_id|>'
        "ipython<|end_header_id|>\n\nsun<|eot_id|>",
        ["user: Rome?", "assistant:  weather(city='Rome')", "tool: sun"]),
    "labelled text": ("labelled_text", {"example": "```\nSYSTEM: Use these.\n<tools>" + json.dumps([WEATHER]) +
        f"</tools>\nUSER: Rome?\nASSISTANT:\n<tool_call>\n{CALL}\n</tool_call>\n```"},
        [None, "user: Rome?", "assistant:  weather(city='Rome')"]),
    "seal-tools": ("seal_tools", {"conversations": [
        s("human", "Choose.\n\nInput:\napi_list = [{'api_name': 'weather', 'api_description': 'Weather', 'parameters': "
          "{'city': {'type': 'str'}}, 'required': ['city']}]\ntask_instruction = \"Rome?\"\nOutput:"),
        s("gpt", "[{'api': 'weather', 'parameters': {'city': 'Rome'}, 'responses': ['API_call_0']}]")]},
        ["user: Rome?", "assistant:  weather(city='Rome')"]),
    "alfworld": ("alfworld_text", "A bed.\nYour task is to: rest.\n> think: Bed.\nOK.\n> think: Go.\nOK.\n> go to bed\nYou do.\n",
        ["user: A bed.\nYour task is to: rest.", "assistant: Bed.\nGo. act(command='go to bed')", "tool: You do."]),
}


LANGCHAIN_CALL = {"name": "weather", "args": {"city": "Rome"}, "id": "c", "type": "tool_call"}
ASKED, CALLED = m("user", "Rome?"), m("assistant", "", tool_calls=[{"id": "c", "function": json.loads(CALL)}])
HM = "assistant: (Hm.)  weather(city='Rome')"
SAID = ["user: Rome?", "assistant:  weather(city='Rome')", "tool: sun", "assistant: Sun."]
# The same conversation in the words of other vendors and libraries; what a person reads in each.
MESSAGES = {
    "anthropic": ({"system": [{"type": "text", "text": "Be brief."}], "messages": [
        ASKED, m("assistant", [{"type": "thinking", "thinking": "Hm.", "signature": "x"}, {"type": "text", "text": "I look."},
                               {"type": "tool_use", "id": "t", "name": "weather", "input": {"city": "Rome"}}]),
        m("user", [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "sun"}]},
                   {"type": "text", "text": "And?"}]), m("assistant", [{"type": "text", "text": "Sun."}])]},
        ["system: Be brief.", SAID[0], "assistant: (Hm.) I look. weather(city='Rome')", SAID[2], "user: And?", SAID[3]]),
    "responses, a list": ([ASKED, {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {"type": "function_call", "call_id": "c", "name": "weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "c", "output": "sun"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Sun."}]}],
        [SAID[0], "assistant: (Hm.)  weather(city='Rome')", *SAID[2:]]),
    "responses, request and answer": ({"instructions": "Be brief.", "input": "Rome?", "output": [
        {"type": "function_call", "call_id": "c", "name": "weather", "arguments": '{"city": "Rome"}'}]},
        ["system: Be brief.", *SAID[:2]]),
    "responses, calls in parallel and a thought before the answer": ([
        ASKED, {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        *({"type": "function_call", "call_id": city, "name": "weather", "arguments": {"city": city}} for city in ("Rome", "Oslo")),
        *({"type": "function_call_output", "call_id": city, "output": city} for city in ("Oslo", "Rome")),
        {"type": "reasoning", "summary": []}, {"type": "reasoning", "summary": [{"type": "summary_text", "text": "So."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Sun."}]}],
        [SAID[0], HM + " weather(city='Oslo')", "tool: Oslo", "tool: Rome", "assistant: (So.) Sun."]),
    "responses, built-in tools": ({"input": "Rome?", "output": [
        {"type": "web_search_call", "id": "w", "action": {"type": "search", "query": "sky", "sources": [{"url": "u"}]}},
        {"type": "file_search_call", "id": "f", "queries": ["sky"], "results": [{"filename": "a", "text": "sun"}]},
        {"type": "code_interpreter_call", "id": "i", "code": "1", "outputs": [{"type": "logs", "logs": "one"}]},
        {"type": "image_generation_call", "id": "g", "result": "AAAA"}, {"type": "local_shell_call", "call_id": "s", "action": {
            "type": "exec", "command": ["ls"]}}, {"type": "local_shell_call_output", "id": "s", "output": "a.txt"},
        {"type": "computer_call", "call_id": "c", "action": {"type": "click"}},
        {"type": "computer_call_output", "call_id": "c", "output": {"type": "computer_screenshot", "image_url": "data:"}},
        {"type": "mcp_call", "id": "m", "name": "weather", "arguments": CALL, "output": None, "error": "down"}]},
        [SAID[0], "assistant:  web_search(type='search', query='sky')", 'tool: [{"url": "u"}]',
         "assistant:  file_search(queries=['sky'])", "tool: sun", "assistant:  code_interpreter(code='1')", "tool: one",
         "assistant:  local_shell(type='exec', command=['ls'])", "tool: a.txt",
         "assistant:  computer(type='click')", "tool: ", "assistant:  weather(name='weather', arguments={'city': 'Rome'})", "tool: down"]),
    "anthropic, tools of the server, citations, documents": ({"messages": [
        m("user", [{"type": "document", "title": "Sky", "source": {"type": "text", "data": "Blue."}}, {"type": "text", "text": "Rome?"}]),
        m("assistant", [{"type": "text", "text": "I look."}, {"type": "server_tool_use", "id": "s", "name": "web_fetch", "input": {"url": "u"}},
            {"type": "web_fetch_tool_result", "tool_use_id": "s", "content": {"type": "web_fetch_result", "url": "u"}},
            {"type": "server_tool_use", "id": "t", "name": "web_search", "input": {"query": "sky"}},
            {"type": "web_search_tool_result", "tool_use_id": "t", "content": [
                {"type": "web_search_result", "url": "v", "encrypted_content": "zz"}]},
            {"type": "text", "text": "It is "}, {"type": "text", "text": "sunny", "citations": [{}]}, {"type": "text", "text": "."}])]},
        ["user: Sky\nBlue.\n\nRome?", "assistant: I look. web_fetch(url='u')", 'tool: {"type": "web_fetch_result", "url": "u"}',
         "assistant:  web_search(query='sky')", 'tool: {"type": "web_search_result", "url": "v"}', "assistant: It is sunny."]),
    "gemini, request and answer": ({"contents": "Rome?", "config": {"systemInstruction": "Be brief.", "tools": [{"googleSearch": {}}]},
        "response": {"candidates": [{"content": {"role": "model", "parts": [
            {"executableCode": {"language": "PYTHON", "code": "1"}}, {"codeExecutionResult": {"output": "one"}},
            {"toolCall": {"toolType": "FILE_SEARCH", "id": "f"}}, {"toolResponse": {"id": "f", "response": {}}}]}}]}},
        ["system: Be brief.", SAID[0], "assistant:  python(code='1')", "tool: one", "assistant:  FILE_SEARCH()", "tool: {}"]),
    "gemini, a part alone": ({"system_instruction": {"parts": {"text": "Be brief."}}, "contents": [
        {"parts": {"text": "Rome?"}}, {"role": "model", "parts": {"text": "Sun."}}]}, ["system: Be brief.", SAID[0], SAID[3]]),
    "gemini, null fields, results by name": ({"contents": [{"parts": [{"functionCall": None, "text": "Rome?"}]}, {"role": "model", "parts": [
        {"thought": True, "text": "Hm."}, {"text": None, "functionCall": {"name": "weather", "args": {"city": "Rome"}}},
        {"functionCall": {"name": "f", "args": {}}}]}, {"parts": [{"functionResponse": {"name": "f", "response": "two"}},
                                                                 {"functionResponse": {"name": "weather", "response": "sun"}}]}]},
        [SAID[0], HM + " f()", "tool: two", "tool: sun"]),
    "gemini": ({"systemInstruction": {"parts": [{"text": "Be brief."}]}, "contents": [
        {"role": "user", "parts": [{"text": "Rome?"}, {"inlineData": {"mimeType": "image/png", "data": ""}}]},
        {"role": "model", "parts": [{"functionCall": {"name": "weather", "args": {"city": "Rome"}}}]},
        {"role": "user", "parts": [{"functionResponse": {"name": "weather", "response": {"sky": "sun"}}}]},
        {"role": "model", "parts": [{"text": "Hm.", "thought": True}, {"text": "Sun."}]}, {"role": "user", "parts": ["So."]}]},
        ["system: Be brief.", *SAID[:2], 'tool: {"sky": "sun"}', "assistant: (Hm.) Sun.", "user: So."]),
    "a call of a model by gemini's agents": ({"input": {"contents": "Rome?"}, "output": {"content": {
        "role": "model", "parts": [{"function_call": {"name": "weather", "args": {"city": "Rome"}}}]}}}, SAID[:2]),
    "openai's agents": ({"original_input": "Rome?", "generated_items": [{"type": "x", "raw_item": item} for item in (
        {"type": "function_call", "call_id": "c", "name": "weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "c", "output": "sun"})]}, SAID[:3]),
    "gemini's agents": ({"events": [
        {"author": "model", "actions": {}},
        {"author": "user", "content": {"role": "user", "parts": [{"text": "Rome?"}]}},
        {"author": "root", "content": None, "actions": {}},
        {"author": "root", "content": {"role": "model", "parts": [{"function_call": {"name": "ask", "args": {}}}]}},
        {"author": "root", "content": {"role": "user", "parts": [{"function_response": {"name": "ask", "response": {}}}]}},
        {"author": "sky", "partial": True, "content": {"role": "model", "parts": [{"text": "[sky]: S"}]}},
        {"author": "sky", "content": {"role": "model", "parts": [{"text": "[sky]: Sun."}]}}]},
        [SAID[0], "assistant:  ask()", "tool: {}", "assistant: [sky]: Sun."]),
    "langchain, by type": ({"messages": [
        {"type": "human", "content": "Rome?"}, {"type": "ai", "content": "", "tool_calls": [LANGCHAIN_CALL]},
        {"type": "tool", "content": "sun", "tool_call_id": "c"}, {"type": "ai", "content": "Sun."}]}, SAID),
    "langchain, with data": ({"messages": [
        {"type": "human", "data": {"content": "Rome?"}}, {"type": "ai", "data": {"content": "", "tool_calls": [LANGCHAIN_CALL]}},
        {"type": "tool", "data": {"content": "sun", "tool_call_id": "c"}}, {"type": "ai", "data": {"content": "Sun."}}]}, SAID),
    "langchain, constructors": ({"messages": [
        {"lc": 1, "type": "constructor", "id": ["langchain", "schema", "messages", name], "kwargs": kwargs} for name, kwargs in [
            ("HumanMessage", {"content": "Rome?"}), ("AIMessage", {"content": "", "tool_calls": [LANGCHAIN_CALL]}),
            ("ToolMessage", {"content": "sun", "tool_call_id": "c"}), ("AIMessageChunk", {"content": "Sun."})]]}, SAID),
    "langchain, a model's parts beside its calls": ({"messages": [{"type": "HumanMessage", "content": "Rome?"}, {
        "type": "AIMessageChunk", "content": [{"type": "tool_use", "id": "c", "name": "weather", "input": {"city": "Rome"}}],
        "tool_calls": [LANGCHAIN_CALL], "additional_kwargs": {"reasoning_content": "Hm."}}]}, [SAID[0], HM]),
    "langchain, older calls": ({"lc": 1, "kwargs": {"messages": [{"type": "human", "content": "Rome?"}, {
        "type": "ai", "content": "", "tool_calls": [], "additional_kwargs": {"function_call": json.loads(CALL)}},
        {"type": "function", "name": "weather", "content": "sun"}]}}, SAID[:3]),
    "langsmith, a model's run": ({
        "run_type": "llm", "inputs": {"messages": [[{"id": ["HumanMessage"], "kwargs": {"content": "Rome?"}}]]},
        "outputs": {"generations": [[{"text": "", "message": {"id": ["AIMessage"], "kwargs": {
            "content": "", "tool_calls": [LANGCHAIN_CALL]}}}]]}, "extra": {"invocation_params": {"tools": [WEATHER]}}}, SAID[:2]),
    "langsmith, an example": ({"inputs": {"input": [{"type": "human", "data": {"content": "Rome?"}}]},
        "outputs": {"output": {"type": "ai", "data": {"content": "Sun."}}}}, [SAID[0], SAID[3]]),
    "langsmith, an agent's run": ({"inputs": {"messages": [ASKED]}, "outputs": {"messages": [
        {"type": "human", "content": "Rome?"}, {"type": "ai", "content": "Sun."}]}}, [SAID[0], SAID[3]]),
    "langchain, an executor's steps": ({"input": "Rome?", "output": "Sun.", "intermediate_steps": [[{
        "tool": "weather", "tool_input": {"city": "Rome"}, "log": "Thought: I look.\nAction: weather\nAction Input: Rome"}, "sun"]]},
        [SAID[0], "assistant: I look. weather(city='Rome')", *SAID[2:]]),
    "bedrock": ({"messages": [m("user", [{"text": "Rome?"}]), m("assistant", [
        {"toolUse": {"toolUseId": "t", "name": "weather", "input": {"city": "Rome"}}}]), m("user", [
            {"toolResult": {"toolUseId": "t", "content": [{"text": "sun"}]}}])],
        "response": {"output": {"message": m("assistant", [{"text": "Sun."}])}}}, SAID),
    "an export of claude.ai": ({"uuid": "u", "chat_messages": [
        {"sender": "human", "text": "Rome?"}, {"sender": "assistant", "text": "Sun."}]}, [SAID[0], SAID[3]]),
    "choices": ({"messages": [ASKED], "choices": [{"message": CALLED}]}, SAID[:2]),
    "request and response": ({"request": {"messages": [ASKED]}, "response": {"choices": [{"message": CALLED}]}}, SAID[:2]),
    "prompt and completion": ({"prompt": "Rome?", "completion": "Sun."}, [SAID[0], SAID[3]]),
    "preferences": ({"prompt": [ASKED], "chosen": [ASKED, m("assistant", "Sun.")], "rejected": [m("assistant", "No.")]},
                    [SAID[0], SAID[3]]),
    "messages as text": ({"uuid": "u", "question": "Rome?", "messages": json.dumps([
        ASKED, m("assistant", "", function_call={"name": "weather", "arguments": '{"city": "Rome"}'}),
        {"role": "function", "name": "weather", "content": "sun"}, m("assistant", "Sun.")])}, SAID),
    "tooltalk": ({"conversation": [{"role": "user", "text": "Rome?"}, {"role": "assistant", "text": "Sun.", "apis": [
        {"request": {"api_name": "weather", "parameters": {"city": "Rome"}}, "response": {"sky": "sun"}, "exception": None}]}]},
        [*SAID[:2], 'tool: {"sky": "sun"}', SAID[3]]),
    "an image beside text": ({"messages": [
        m("user", [{"type": "text", "text": "Rome?"}, {"type": "image_url", "image_url": {"url": "x"}}]), CALLED]}, SAID[:2]),
    "a tool that takes text": ({"messages": [ASKED, m("assistant", None, tool_calls=[
        {"id": "c", "type": "custom", "custom": {"name": "patch", "input": "*** Begin"}}])]},
        [SAID[0], "assistant:  patch(input='*** Begin')"]),
    "a tool called with code": ({"messages": [ASKED, m("assistant", None, tool_calls=[
        {"id": "c", "type": "function", "function": {"name": "python", "arguments": "print(1)"}}])]},
        [SAID[0], "assistant:  python(input='print(1)')"]),
    "refusal": ({"messages": [ASKED, m("assistant", None, refusal="I cannot.")]}, [SAID[0], "assistant: I cannot."]),
    "harmony in json": ({"messages": [ASKED, m("assistant", [{"type": "text", "text": "Hm."}], channel="analysis", recipient=None),
        m("assistant", '{"city": "Rome"}', channel="commentary", recipient="functions.weather", content_type="json"),
        m("tool", "sun", name="functions.weather", recipient="assistant"), m("assistant", "Sun.", channel="final")]},
        [SAID[0], HM, *SAID[2:]]),
    "what was spoken": ({"messages": [m("user", [{"type": "input_audio", "input_audio": {"data": "AA"}, "transcript": "Rome?"}]),
                                      m("assistant", None, audio={"id": "a", "transcript": "Sun."})]}, [SAID[0], SAID[3]]),
    "reasoning": ({"messages": [ASKED, m("assistant", "Sun.", reasoning="Hm.")]}, [SAID[0], "assistant: (Hm.) Sun."]),
    "no arguments, no result": ({"messages": [ASKED, m("assistant", None, tool_calls=[
        {"id": "c", "function": {"name": "f", "arguments": ""}}]), m("tool", None, tool_call_id="c")]},
        [SAID[0], "assistant:  f()", "tool: "]),
    "result as an object": ({"messages": [ASKED, CALLED, m("tool", {"t": 3}, tool_call_id="c"), m("assistant", "Sun.")]},
                            [*SAID[:2], 'tool: {"t": 3}', SAID[3]]),
    "result as a list": ({"messages": [ASKED, CALLED, m("tool", ["a"], tool_call_id="c")]}, [*SAID[:2], 'tool: ["a"]']),
    "system messages": ({"messages": [
        m("system", "A."), m("developer", "B."), ASKED, m("system", "It is Monday."), m("assistant", "Sun.")]},
        ["system: A.\n\nB.", SAID[0], "user: It is Monday.", SAID[3]]),
    "null fields": ({"messages": [ASKED | {"action": None, "tool_calls": None},
                                  m("assistant", [{"type": "text", "text": None}, {"type": "text", "text": "Sun."}], thought=None)]},
                    [SAID[0], SAID[3]]),
    "qwen3-coder": ({"messages": [ASKED, m("assistant", "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n"
        "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>")]}, [SAID[0], "assistant:  weather(city='Rome', days=2)"]),
    "mistral's text": ({"messages": [ASKED, m("assistant", f"[TOOL_CALLS][{CALL}]</s>")]}, SAID[:2]),
    "mistral's newer text": ({"messages": [ASKED, m("assistant", '[TOOL_CALLS]weather[ARGS]{"city": "Rome"}')]}, SAID[:2]),
    "llama's text": ({"messages": [ASKED, m("assistant", "<|python_tag|>" + CALL.replace("arguments", "parameters"))]}, SAID[:2]),
    "llama's code": ({"messages": [ASKED, m("assistant", "<|python_tag|>print(1)<|eom_id|>")]},
                     [SAID[0], "assistant:  python(code='print(1)')"]),
    "llama's several": ({"messages": [ASKED, m("assistant", f"<|python_tag|>{CALL}; {CALL}<|eom_id|>")]},
        [SAID[0], SAID[1] + SAID[1][11:]]),
    "llama's built-in tool": ({"messages": [
        ASKED, m("assistant", '<|python_tag|>weather.call(city="Rome")<|eom_id|>')]}, SAID[:2]),
    "llama's bare JSON": ({"tools": [WEATHER], "messages": [
        ASKED, m("assistant", CALL.replace("arguments", "parameters")), m("ipython", "sun")]}, SAID[:3]),
    "python's calls": ({"tools": [WEATHER], "messages": [
        ASKED, m("assistant", '<think>Hm.</think>[weather(city="Rome")]'), m("tool", "sun"),
        m("assistant", "[Note] Sun (warm)."), ASKED, m("assistant", '[{"name": "snow", "arguments": {}}]')]},
        [SAID[0], "assistant: (Hm.)  weather(city='Rome')", SAID[2], "assistant: [Note] Sun (warm).", SAID[0],
         'assistant: [{"name": "snow", "arguments": {}}]']),
    "openhands' text": ({"messages": [
        ASKED, m("assistant", "I look.\n\n<function=weather>\n<parameter=city>Rome</parameter>\n"),
        m("user", "EXECUTION RESULT of [weather]:\nsun"), m("assistant", "<function=now>\n</function>")]},
        [SAID[0], "assistant: I look. weather(city='Rome')", SAID[2], "assistant:  now()"]),
    "llama's tags": ({"messages": [
        ASKED, m("assistant", '<function=weather>{"city": "Rome"}</function>')]}, SAID[:2]),
    "anthropic's text": ({"messages": [ASKED, m("assistant", "<function_calls>\n<invoke name=\"weather\">\n"
        "<parameter name=\"city\">Rome</parameter>\n</invoke>\n</function_calls>")]}, SAID[:2]),
    "glm": ({"messages": [ASKED, m("assistant",
        "hm</think>I look.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n"
        "</tool_call><tool_call>now\n</tool_call>")]},
        [SAID[0], "assistant: (hm) I look. weather(city='Rome') now()"]),
    "deepseek": ({"messages": [ASKED, m("assistant",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{\"city\": \"Rome\"}\n"
        "```<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        "<｜end▁of▁sentence｜>")]}, [SAID[0], SAID[1] + " now()"]),
    "kimi": ({"messages": [ASKED, m("assistant",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        "{\"city\": \"Rome\"}<|tool_call_end|><|tool_calls_section_end|>")]}, SAID[:2]),
    "a call in a thought": ({"messages": [
        ASKED, m("assistant", f"<think>Perhaps <tool_call>{CALL}</tool_call>.</think>Sun.")]},
        [SAID[0], f"assistant: (Perhaps <tool_call>{CALL}</tool_call>.) Sun."]),
    "a thought said twice": ({"messages": [
        ASKED, m("assistant", "<think>Hm.\n</think>Sun.", reasoning_content="Hm.")]},
        [SAID[0], "assistant: (Hm.) Sun."]),
    "a thought that is not shown": ({"messages": [ASKED, m("assistant", [
        {"type": "reasoning", "reasoning": "Zm9v", "summary": "Hm.", "redacted": True},
        {"type": "text", "text": "Sun."}])]}, [SAID[0], "assistant: (Hm.) Sun."]),
    "no parts": ({"messages": [ASKED, CALLED | {"content": []}, m("tool", [], tool_call_id="c")]},
        [*SAID[:2], "tool: "]),
    "an answer beside messages": ({"messages": [ASKED], "response": {"choices": [{"message": CALLED}]}},
        SAID[:2]),
    "responses among messages, and why a run ended": ({"messages": [
        ASKED, {"object": "response", "output": [{"type": "reasoning", "summary": []},
            {"type": "function_call", "call_id": "c", "name": "weather", "arguments": '{"city": "Rome"}'}]},
        {"type": "function_call_output", "call_id": "c", "output": "sun"}, m("exit", "LimitsExceeded")]},
        SAID[:3]),
    "a last call's result": ({"messages": [ASKED, CALLED, m("exit", "sun")]}, SAID[:3]),
    "results of several calls": ({"messages": [ASKED, CALLED, {"role": "tool", "tool_messages": [
        {"role": "tool", "id": "c", "content": "sun", "requestor": "assistant", "error": False}]}]},
        SAID[:3]),
    "smolagents": ({"messages": [
        ASKED, m("tool-call", f"Calling tools:\n[{{'id': 'c', 'type': 'function', 'function': {CALL}}}]"),
        m("tool-response", "Observation:\nsun")]}, SAID[:3]),
    "mistral's thought": ({"messages": [
        ASKED, m("assistant", '[THINK]Hm.[/THINK][TOOL_CALLS]weather[CALL_ID]x[ARGS]{"city": "Rome"}')]},
        [SAID[0], "assistant: (Hm.)  weather(city='Rome')"]),
    "words that are no action": ({"messages": [ASKED, m("assistant", "My plan.\nAction: buy milk\nThen put it into <execute> tags.")]},
        [SAID[0], "assistant: My plan.\nAction: buy milk\nThen put it into <execute> tags."])}


def delta(**more):
    return {"choices": [{"index": 0, "delta": more}]}


PIECES = {  # what came as a stream, and what the assistant says in it
    "openai": ([delta(role="assistant", content=""), delta(content="I "), delta(content="look."),
                delta(tool_calls=[{"index": 0, "id": "c", "type": "function", "function": {"name": "weather", "arguments": ""}}]),
                delta(tool_calls=[{"index": 0, "function": {"arguments": '{"city": '}}]),
                delta(tool_calls=[{"index": 0, "function": {"arguments": '"Rome"}'}}]), {"choices": []}], "assistant: I look."),
    "anthropic": ([{"type": "message_start", "message": m("assistant", [])},
                   {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}},
                   {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "Hm."}},
                   {"type": "content_block_start", "index": 1, "content_block": {"type": "tool_use", "id": "t", "name": "weather", "input": {}}},
                   *({"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": piece}}
                     for piece in ("", '{"city":', ' "Rome"}'))], "assistant: (Hm.) "),
    "responses": ([{"type": "response.created", "response": {"output": []}}, {"type": "response.completed", "response": {"output": [
        {"type": "function_call", "call_id": "c", "name": "weather", "arguments": '{"city": "Rome"}'}]}}], "assistant: "),
    "gemini": ([{"candidates": [{"content": {"parts": [part]}}]} for part in (
        {"text": "I "}, {"text": "look."}, {"functionCall": {"name": "weather", "args": {"city": "Rome"}}})], "assistant: I look.")}


@pytest.mark.parametrize("vendor", PIECES)
def test_an_answer_in_pieces(vendor, tmp_path):
    """A streamed answer that is left out, as text and as a list of events."""
    events, said = PIECES[vendor]
    text = "".join(f"event: x\ndata: {json.dumps(event)}\n\n" for event in events)
    for response in (events, text, text + "data: [DONE]\n"):
        messages, _ = converted(tmp_path, {"request": {"messages": [ASKED]}, "response": response})
        assert brief(messages) == [SAID[0], said + " weather(city='Rome')"]


@pytest.mark.parametrize("case", MESSAGES)
def test_messages_in_others_words(case, tmp_path):
    record, expected = MESSAGES[case]
    assert recognise(record) == "messages"
    path = write(tmp_path, "one.json", json.dumps(record))
    [found] = chat_records(path, "one", "MIT")
    assert isinstance(found, Record), found
    assert brief(found.messages) == expected


def test_a_log_of_a_session_is_one_conversation(tmp_path):
    """As Claude Code writes it: a line a message; side agents apart; summaries are none."""
    def line(n, message, side=False):
        return {"type": message["role"], "uuid": f"u{n}", "sessionId": "s", "isSidechain": side, "message": message}
    lines = [{"type": "summary", "summary": "Sky", "leafUuid": "u3"}, line(0, ASKED), line(1, m("assistant", [
        {"type": "tool_use", "id": "t", "name": "weather", "input": {"city": "Rome"}}])),
        line(5, m("user", "Look."), True), line(6, m("assistant", "I do."), True),
        line(2, m("user", [{"type": "tool_result", "tool_use_id": "t", "content": "sun"}])),
        line(3, m("assistant", [{"type": "text", "text": "Sun."}]))]
    path = write(tmp_path, "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in lines))
    args = argparse.Namespace(chat_domain="trajectory", chat_format=None)
    found = [r for r in collect.chat_records(path, "log", "MIT", args) if isinstance(r, Record)]
    assert [brief(r.messages) for r in found] == [SAID, ["user: Look.", "assistant: I do."]]


def test_sides_of_a_session_and_other_logs(tmp_path):
    """Two side agents as one; an API's error as the model's words; logs without ids, or in one list, that are not read."""
    def sides(i, *said):
        return [{"type": role, "uuid": f"{word}{i}", "parentUuid": f"{word}0" if i else None, "sessionId": "s",
                 "isSidechain": True, "message": m(role, word)} for role, word in said]
    lines = [{"type": "user", "message": {"content": "c"}}, {"type": "assistant", "message": {"content": "d"}},
             {"type": "assistant", "message": m("assistant", "API Error", model="<synthetic>")},
             {"type": "attachment", "attachment": {"type": "queued_command", "prompt": "e", "commandMode": "prompt"}},
             {"type": "attachment", "attachment": {"type": "todo_reminder"}}]
    log = [*sides(0, ("user", "a"), ("user", "b")), *sides(1, ("assistant", "a"), ("assistant", "b")), *lines]
    args = argparse.Namespace(chat_domain="trajectory", chat_format=None)
    path = write(tmp_path, "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))
    found = [brief(r.messages) for r in collect.chat_records(path, "log", "MIT", args)]
    assert found == [["user: a", "assistant: a"], ["user: b", "assistant: b"], ["user: c", "assistant: d", "user: e"]]
    path = write(tmp_path, "log.json", json.dumps({"loglines": lines}))
    assert [brief(r.messages) for r in collect.chat_records(path, "log", "MIT", args)] == found[2:]


def chats(tmp_path, name, text):
    """(where, brief messages, tools) of each record of a file, or the reason of its rejection."""
    args = argparse.Namespace(chat_domain="trajectory", chat_format=None)
    found = collect.chat_records(write(tmp_path, name, text), "log", "MIT", args)
    return [(r.id, brief(r.messages), r.tools) if isinstance(r, Record) else r["reason"] for r in found]


def span(n, trace="t", **attributes):
    return {"start_time": n, "context": {"trace_id": trace}, "attributes": attributes}


def leaves(prefix, *messages):
    """Messages as attributes of OpenInference, one a leaf."""
    found = {}
    for i, message in enumerate(messages):
        at = f"{prefix}.{i}.message."
        found |= {at + "role": message["role"], at + "content": message["content"]}
        for j, made in enumerate(message.get("tool_calls", ())):
            at = f"{at}tool_calls.{j}.tool_call."
            found |= {at + "id": made["id"], at + "function.name": made["function"]["name"],
                      at + "function.arguments": json.dumps(made["function"]["arguments"])}
    return found


RESULT = m("tool", "sun", tool_call_id="c")
OFFERED = [{"type": "function", "function": WEATHER}]
OPENINFERENCE = [
    span(1, **{"openinference.span.kind": "AGENT", "output.value": "Sun."}),
    span(2, **leaves("llm.input_messages", ASKED), **leaves("llm.output_messages", CALLED),
         **{"llm.tools.0.tool.json_schema": json.dumps(OFFERED[0])}),
    span(3, **{"openinference.span.kind": "TOOL", "tool.name": "weather", "output.value": "sun"}),
    span(4, **leaves("llm.input_messages", ASKED, CALLED, RESULT),
         **leaves("llm.output_messages", m("assistant", "Sun.")))]
TRACES = {
    "openinference": OPENINFERENCE,
    "an attribute a leaf, older": [span(1, **{
        "gen_ai.prompt.0.role": "user", "gen_ai.prompt.0.content": "Rome?",
        "gen_ai.prompt.1.role": "assistant", "gen_ai.prompt.1.tool_calls.0.id": "c",
        "gen_ai.prompt.1.tool_calls.0.name": "weather",
        "gen_ai.prompt.1.tool_calls.0.arguments": '{"city": "Rome"}', "gen_ai.prompt.2.role": "tool",
        "gen_ai.prompt.2.content": "sun", "gen_ai.prompt.2.tool_call_id": "c",
        "gen_ai.completion.0.role": "assistant", "gen_ai.completion.0.content": "Sun.",
        "llm.request.functions.0.name": "weather", "llm.request.functions.0.description": "Weather",
        "llm.request.functions.0.parameters": json.dumps(WEATHER["parameters"])})],
    "an event a message": [span(1, **{"gen_ai.tool.definitions": json.dumps(OFFERED)}) | {"events": [
        {"name": "gen_ai.user.message", "attributes": {"content": "Rome?"}},
        {"name": "gen_ai.assistant.message", "attributes": {"tool_calls": CALLED["tool_calls"]}},
        {"name": "gen_ai.tool.message", "attributes": {"content": "sun", "id": "c"}},
        {"name": "gen_ai.choice", "attributes": {"message": '{"content": "Sun."}'}}]}],
    "events in an attribute": [
        span(1, **{"gen_ai.tool.definitions": json.dumps(OFFERED), "events": json.dumps([
            {"event.name": "gen_ai.user.message", "content": "Rome?", "role": "user"},
            {"event.name": "gen_ai.choice", "index": 0, "message": CALLED}])}),
        span(2, **{"gen_ai.input.messages": json.dumps([ASKED, CALLED, RESULT]),
                   "gen_ai.output.messages": json.dumps([m("assistant", "Sun.")])})],
    "as exported": {"resourceSpans": [{"scopeSpans": [{"spans": [{"startTimeUnixNano": "1", "attributes": [
        {"key": "gen_ai.input.messages", "value": {"stringValue": json.dumps([ASKED, CALLED, RESULT])}},
        {"key": "gen_ai.tool.definitions", "value": {"stringValue": json.dumps(OFFERED)}},
        {"key": "gen_ai.output.messages", "value": {"stringValue": json.dumps([m("assistant", "Sun.")])}},
    ]}]}]}]}}


@pytest.mark.parametrize("case", TRACES)
def test_traces_by_other_conventions(case, tmp_path):
    """A call, a result or an answer lost or said twice; tools made up though they are listed."""
    for name in ("a.json", "a.jsonl"):
        lines = TRACES[case] if name == "a.jsonl" and isinstance(TRACES[case], list) else [TRACES[case]]
        [(_, said, tools)] = chats(tmp_path, name, "\n".join(map(json.dumps, lines)))
        assert said == SAID and tools == OFFERED


def test_several_conversations_in_traces(tmp_path):
    """What a second agent, or another trace, said among the words of the first."""
    other = [m("system", "Hi."), m("user", "Oslo?")]
    spans = [span(2.5, **leaves("llm.input_messages", *other),
                  **leaves("llm.output_messages", m("assistant", "Snow."))),
             *OPENINFERENCE, span(9, "u", **{"gen_ai.prompt": "Bonn?", "gen_ai.completion": "Fog."})]
    found = [said for _, said, _ in chats(tmp_path, "a.json", json.dumps(spans))]
    assert found == [
        SAID, ["system: Hi.", "user: Oslo?", "assistant: Snow."], ["user: Bonn?", "assistant: Fog."]]


def test_events_of_openhands_sdk(tmp_path):
    """Events of the newer SDK unknown; calls of one answer in two messages; the older system prompt lost."""
    def event(kind, source="agent", **more):
        return {"id": str(more), "kind": kind, "source": source, **more}
    said = [{"type": "text", "text": "I look."}]
    events = [
        event("SystemPromptEvent", system_prompt={"type": "text", "text": "Help."}, tools=OFFERED),
        event("MessageEvent", "user", llm_message=m("user", [{"type": "text", "text": "Rome?"}])),
        event("ConversationStateUpdateEvent", "environment", key="stats", value={}),
        *(event("ActionEvent", thought=said if id == "c" else [], action={}, tool_name="weather",
                tool_call_id=id, llm_response_id="r", tool_call={"id": id, "name": "weather", "arguments":
                json.dumps({"city": city})}) for id, city in (("c", "Rome"), ("d", "Oslo"))),
        event("ObservationEvent", "environment", tool_name="weather", tool_call_id="d", observation={
            "content": [{"type": "text", "text": "snow"}]}),
        event("AgentErrorEvent", tool_name="weather", tool_call_id="c", error="No."),
        event("ActionEvent", thought=[], action={"kind": "FinishAction", "message": "Snow."},
              tool_name="finish", tool_call_id="e", llm_response_id="s")]
    expected = ["system: Help.", "user: Rome?",
                "assistant: I look. weather(city='Rome') weather(city='Oslo')",
                "tool: snow", "tool: No.", "assistant:  finish(message='Snow.')"]
    for name in ("a.json", "a.jsonl"):
        lines = events if name == "a.jsonl" else [events]
        assert chats(tmp_path, name, "\n".join(map(json.dumps, lines)))[0][1:] == (expected, OFFERED)
    older = {"source": "agent", "action": "system", "args": {"content": "Help.", "tools": OFFERED}}
    [(_, said, tools)] = chats(tmp_path, "b.json", json.dumps([older, *CASES["openhands"][1]]))
    assert said == ["system: Help.", *CASES["openhands"][2]] and tools == OFFERED


def test_samples_of_inspect(tmp_path):
    """Tools offered, texts kept apart or a tool's error lost; a bad sample that takes the others with it."""
    samples = [
        {"messages": [m("user", "attachment://1"), CALLED, m("tool", "", tool_call_id="c", error={
            "type": "timeout", "message": "Too slow."})], "attachments": {"1": "Rome?", "2": "Weather"},
         "events": [{"event": "state"}, {
             "event": "model", "tools": [WEATHER | {"description": "attachment://2"}]}]},
        {"messages": [ASKED, m("assistant", "", tool_calls=[
            {"id": "c", "function": "f", "arguments": "[1]"}])]},
        {"messages": [ASKED, m("assistant", "Sun.")]}]
    first, second, third = chats(tmp_path, "a.json", json.dumps({"samples": samples}))
    assert first[1:] == ([*SAID[:2], "tool: Too slow."], OFFERED)
    assert "not a call" in second and third[1] == [SAID[0], SAID[3]]


def test_ids_of_the_agent_data_protocol(tmp_path):
    """Results of calls made together taken for the user's words, or for one another's; a thought lost."""
    messages, _ = converted(tmp_path, {"id": "1", "content": [
        {"class_": "text_observation", "content": "Rome?", "source": "user"},
        {"class_": "api_action", "tool_call_id": "a", "function": "f", "reasoning_content": "Hm."},
        {"class_": "code_action", "tool_call_id": "b", "language": "bash", "content": "ls"},
        {"class_": "text_observation", "tool_call_id": "b", "content": "x", "source": "environment"},
        {"class_": "text_observation", "tool_call_id": "a", "content": "y", "source": "environment"}]})
    assert brief(messages) == [
        "user: Rome?", "assistant: (Hm.)  f() bash(command='ls')", "tool: x", "tool: y"]
    assert [m["tool_call_id"] for m in messages[2:]] == ["b", "a"]


def test_a_result_of_another_call_is_not_taken_for_one_that_is_answered(tmp_path):
    result = m("tool", "sun", tool_call_id="other")
    [reason] = chats(tmp_path, "a.json", json.dumps([ASKED, CALLED, RESULT, result]))
    assert reason == "message 3: a result without a call before it"


@pytest.mark.parametrize("listed", [
    {"name": "weather", "description": "Weather", "input_schema": WEATHER["parameters"]},
    {"name": "weather", "description": "Weather", "inputSchema": WEATHER["parameters"]},
    {"type": "function", **WEATHER}, {"functionDeclarations": [WEATHER]}, {"type": "custom", "custom": WEATHER},
    {"name": "weather", "description": "Weather", "parametersJsonSchema": WEATHER["parameters"]},
    {"name": "weather", "description": "Weather", "arguments": [{"name": "city", "type": "string"}]}],
    ids="anthropic mcp responses gemini custom schema docker".split())
def test_tools_in_others_words(listed, tmp_path):
    """Built-in tools have no name of their own, and are no tools of the conversation; a null property is none."""
    tools = [listed, {"type": "code_interpreter"}, {"googleSearch": {}}]
    _, found = converted(tmp_path, {"messages": [ASKED, CALLED], "tools": tools})
    assert found == [{"type": "function", "function": WEATHER}]


def test_tools_of_harmony_and_of_an_mcp_server(tmp_path):
    """A tool under another name than its calls, choices or descriptions that are lost; what an MCP server lists."""
    text = ("<|start|>developer<|message|># Tools\n\nnamespace web {\n\n// Sky\n//\n// now\ntype weather = (_: {\n// Where\n"
            'city?: "Rome" | "Oslo", // default: Rome\ndays: number[],\n}) => any;\n\n} // namespace web<|end|>'
            "<|start|>user<|message|>Rome?<|end|><|start|>assistant<|channel|>final<|message|>Sun.<|return|>")
    _, [found] = converted(tmp_path, text)
    assert found["function"] == {"name": "web.weather", "description": "Sky\n\nnow", "parameters": {
        "type": "object", "required": ["days"], "properties": {
            "city": {"type": "string", "enum": ["Rome", "Oslo"], "description": "Where"},
            "days": {"type": "array", "items": {"type": "number"}}}}}
    items = [ASKED, {"type": "mcp_list_tools", "tools": [WEATHER]}, m("assistant", "Sun.")]
    assert converted(tmp_path, {"input": items})[1] == [{"type": "function", "function": WEATHER}]


def test_what_a_table_filled_up_with_null_is_absent(tmp_path):
    schema = {"type": "object", "properties": {"city": {"type": "string"}, "symbol": None}}
    called = m("assistant", "", tool_calls=[{"id": "c", "function": {"name": "weather", "arguments": {"city": "Rome", "symbol": None}}}])
    messages, tools = converted(tmp_path, {"messages": [ASKED, called], "tools": [{"name": "weather", "parameters": schema}]})
    assert brief(messages)[1] == SAID[1] and [*tools[0]["function"]["parameters"]["properties"]] == ["city"]


@pytest.mark.parametrize("listed", [
    f" {[WEATHER]!r} ", f"\n{[WEATHER]!r}\n", "\n" + "\n".join(map(repr, [WEATHER, WEATHER | {"name": "it's"}])) + "\n"])
def test_tools_written_in_python(listed):
    assert collect.tools_in(f"Call: <tools>{listed}</tools> For each return {{'name': <name>}}.")[0]["function"] == WEATHER


@pytest.mark.parametrize("case", CASES)
def test_by_hand(case, tmp_path):
    """A wrong call or argument, a lost thought, or a turn of the wrong role, in any format."""
    form, record, expected = CASES[case]
    assert recognise(record) == form
    messages, tools = converted(tmp_path, record)
    assert brief(messages)[expected[0] is None:] == expected[expected[0] is None:]
    ids = [c["id"] for m in messages for c in m.get("tool_calls", ())]
    results = [m["tool_call_id"] for m in messages if m["role"] == "tool"]
    assert results == (["x8", "x9"] if "ids kept" in case else [i for i in ids if i in results])
    if case in ("hermes", "glaive v2", "sharegpt roles", "openai function_call"):
        assert tools == [{"type": "function", "function": WEATHER}]


def test_tools(tmp_path):
    """Tools not derived from the calls when the source names none; Python's type names or flat parameters left in schemas."""
    _, tools = converted(tmp_path, CASES["agent data protocol"][1])
    assert tools[0]["function"] == {"name": "weather", "description": "", "parameters": WEATHER["parameters"]}
    _, tools = converted(tmp_path, CASES["xlam"][1])
    assert schema(tools, "weather") == {"type": "object", "required": ["city"], "properties": {
        "city": {"type": "string", "description": "where"}, "days": {"type": "integer", "default": 1}}}
    assert [t["function"]["name"] for t in converted(tmp_path, CASES["toolbench text"][1])[1]] == ["weather"]
    assert schema(converted(tmp_path, CASES["api-bank"][1])[1], "Cancel")["properties"] == {"id": {"type": "string"}}


def test_calls_are_literals_only():
    """Code in a call, which an evaluator would run."""
    for text in ("f(a=__import__('os').getcwd())", "[f(a=1), 2]", "f(**{'a': 1})", "f(a=(lambda: 1)())", "f(" * 5000, "[" * 9_999,
                 "f(a=" + "1" * 2**20 + ")"):
        with pytest.raises(ValueError):
            python_calls(text)


@pytest.mark.parametrize("messages, reason", [
    ([m("user", "a")], "no assistant"),
    ([m("assistant", "a")], "no user"),
    ([m("user", "a"), m("assistant", "b"), m("tool", "c")], "without a call"),
    ([m("user", "a"), m("narrator", "b")], "'narrator' message"),
    ([m("user", "a"), m("assistant", "", function_call={"name": "f", "arguments": "{\"a\": "})], "neither JSON"),
    ([m("user", "a"), m("assistant", "", function_call={"name": "f", "arguments": "[1]"})], "not a call"),
    ([m("user", [{"type": "image_url"}])], "image_url"),
    ([m("user", "a"), m("assistant", "", tool_calls=[], invalid_tool_calls=[{"name": "f", "args": "{\"a\": "}]),
      m("tool", "b")], "neither JSON"),
])
def test_bad_conversations_are_rejected_with_a_reason(messages, reason, tmp_path):
    """A conversation that breaks the contract in the corpus, or one that ends the run."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps(CASES["xlam"][1]) + "\n17\n")
    bad, good, unknown = chat_records(path, "a.jsonl", "MIT")
    assert (bad["file"], bad["line"]) == ("chat:a.jsonl", 1) and reason in bad["reason"]
    assert good.id == "trajectory:chat:a.jsonl:2" and good.source == "chat:a.jsonl" and good.apis == ["weather"]
    assert unknown["line"] == 3 and "no known format" in unknown["reason"]


def test_form_can_be_forced(tmp_path):
    """--form ignored: a text that looks like plain chat is read as ReAct on demand."""
    record = {"messages": [m("user", "a"), m("assistant", "Hm\n```bash\nls\n```")]}
    assert "bash(" not in brief(converted(tmp_path, record)[0])[1]
    assert brief(converted(tmp_path, record, form="react")[0])[1] == "assistant: Hm bash(command='ls')"
    with pytest.raises(ValueError):
        check_conversation([])


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def write(tmp_path, name, data):
    path = tmp_path / name
    data = data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def shape(values):
    return [(where, "error" if isinstance(value, ValueError) else value) for where, value in values]


@pytest.mark.parametrize("name, data, expected", [
    ("a.jsonl", '{"a": 1}\n\n{"a": \n{"a": NaN}\n"\\ud800"', [(1, {"a": 1}), (3, "error"), (4, {"a": None}), (5, "\ud800")]),
    ("a.jsonl.gz", '{"a": 1}\n', [(1, {"a": 1})]),
    ("a.json", '[{"a": "x,]\\\\"}, {"a": [{}]},\n {"b" 2}, {}]', [(0, {"a": "x,]\\"}), (1, {"a": [{}]}), (2, "error")]),
    ("a.json", '[{"a": 1}, {"a": 2}, {"a": ', [(0, {"a": 1}), (1, {"a": 2}), (2, "error")]),
    ("a.json", '{"a": 1}\n{"a": 2}\n', [(1, {"a": 1}), (2, {"a": 2})]),
    ("a.json", '{"x": {"a": 1}, "y": {"a": 2}}', [("x", {"a": 1}), ("y", {"a": 2})]), ("a.json", '{"x": {"a": 1}, "y": {"a', [(0, "error")]),
    ("a.json", json.dumps({"messages": [m("user", "a")]}), [(0, {"messages": [m("user", "a")]})]),
    ("a.traj", json.dumps([m("user", "a"), m("tool", "b")]), [(0, [m("user", "a"), m("tool", "b")])]),
    ("a.json", "\ufeff[]", []), ("a.json", "", [(0, "error")]), ("a.json", "hello", [(0, "error")]),
    ("a.json", b'["\xff\x00"]', [(0, "error")]), ("a.jsonl", b'"\xff"\n"b"', [(1, "\ufffd"), (2, "b")]),
    ("a.json", "[" * 10_000, [(0, "error")]), ("a.json", "[{}, " + "[" * 10_000 + "]" * 10_000 + ", {}]", [(0, {}), (1, "error")]),
    ("a.csv", 'text,n\n"a ""b""\nc",1\nd,2\n', [(3, {"text": 'a "b"\nc', "n": "1"}), (4, {"text": "d", "n": "2"})]),
    ("a.txt", "Task:\n\x00", [(0, "Task:\n\x00")]),
])
def test_read_values(name, data, expected, tmp_path, monkeypatch):
    """A record lost, invented or out of place; one broken record that hides those before it, or the lines after it."""
    path = write(tmp_path, name, data)
    assert shape(read_values(path)) == expected
    monkeypatch.setattr(collect, "CHUNK", 3)  # so that every token is cut in two somewhere
    assert shape(read_values(path)) == expected


@pytest.mark.parametrize("name, before, filler, after, expected", [
    ("a.jsonl", "1\n\"", "x", "\"\n2", [(1, 1), (2, "error"), (3, 2)]),
    ("a.json", '[{}, {"a": "', "x", '"}, {}]', [(0, {}), (1, "error")]),
    ("a.csv", "text\na\n", "x", "\nb\n", [(2, {"text": "a"}), (3, "error"), (4, {"text": "b"})]),
    ("a.json", "[{}, ", "[", "", [(0, {}), (1, "error")]),
    ("a.json", "", "x", "", [("end", "error")]),
], ids=["line", "member", "row", "brackets", "letters"])
def test_100_mb_records_cost_bounded_time_and_memory(name, before, filler, after, expected, tmp_path, monkeypatch):
    """A record held in memory beyond the cap, or scanned in quadratic time. (A hundredth of the sizes, to be quick.)"""
    monkeypatch.setattr(collect, "MAX_RECORD", 2**16)
    monkeypatch.setattr(collect, "CHUNK", 2**14)
    path = write(tmp_path, name, before + filler * 1_000_000 + after)
    tracemalloc.start()
    start = time.time()
    assert shape(read_values(path)) == expected
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 700_000 and time.time() - start < 10


def test_gzip_bomb_and_truncated_gzip(tmp_path, monkeypatch):
    """A bomb unpacked to the end; a cut file that ends the run or loses the lines before the cut."""
    monkeypatch.setattr(collect, "UNZIPPED", 10**6)
    path = write(tmp_path, "bomb.jsonl.gz", b'{"a": 1}\n' + b" " * 3 * 10**7)
    *good, (where, error) = read_values(path)
    assert shape(good) == [(1, {"a": 1})] and where == "end" and "unzips" in str(error)
    lines = "".join(json.dumps({"a": i, "b": zlib.crc32(bytes([i % 256, i // 256]))}) + "\n" for i in range(2000))
    whole = gzip.compress(lines.encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:len(whole) // 2])
    values = list(read_values(tmp_path / "cut.jsonl.gz"))
    assert len(values) > 500 and [v["a"] for _, v in values[:-1]] == list(range(len(values) - 1)) and values[-1][0] == "end"
    (tmp_path / "no.jsonl.gz").write_bytes(b"not gzip")
    assert shape(read_values(tmp_path / "no.jsonl.gz")) == [("end", "error")]


@pytest.mark.parametrize("value", [
    {"messages": [m("user", "a")] * 100_000}, {"messages": [m("tool", "a")] * 50_000},
    {"instruction": "a", "output": "Thought:\n" * 300_000}, {"system": "{\"a\":\n" * 50_000, "chat": "USER: a\n\nASSISTANT: b"},
    "Question: a\n" * 50_000, {"conversations": [s("gpt", "<tool_call>" * 50_000)]},
    "<|im_start|>user\n" + " " * 200_000 + "x",
    "<|start|>system<|message|>namespace a {\n" + "// a\n" * 200_000 + "type a = (\nb: c\n" * 20_000,
    {"messages": [], "response": [{"choices": [{"delta": {"content": "a", "tool_calls": [{"function": {}}]}}]}] * 100_000},
    {"system": "s", "conversations": [s("assistant", "[f(" * 100_000)]}, {"tree": {"tree": {}}, "answer_generation": {}},
    *({"messages": [m("user", "a"), m("assistant", text)]} for text in (
        "[TOOL_CALLS]a[ARGS]{" * 20_000, "[TOOL_CALLS]a[ARGS]{}x" * 20_000, "<tool_call>{" * 30_000, "<execute>x" * 30_000,
        "<tool_call><function=f>" + "<parameter=a>x" * 30_000 + "</function></tool_call>",
        "<function=f>x</function" * 20_000,
        "<tool_call>f<arg_key>a</arg_key>" * 20_000, " " * 200_000 + "x")),
], ids=["messages", "results", "thoughts", "tools", "questions", "tags", "template", "types", "pieces", "calls", "tree",
        "mistral", "mistral closed", "hermes", "execute", "xml", "functions", "glm", "spaces"])
def test_hostile_records_end_soon(value, tmp_path):
    """A converter that takes quadratic time, or an error that ends the run."""
    start = time.time()
    text = isinstance(value, str)
    path = write(tmp_path, "a.txt" if text else "a.jsonl", value if text else json.dumps(value))
    assert sum(1 for _ in chat_records(path, "a", "MIT")) > 0
    assert time.time() - start < 10


def test_surrogates_can_be_written(tmp_path):
    """A lone surrogate, valid in JSON text, that no UTF-8 file can hold."""
    messages, _ = converted(tmp_path, {"messages": [m("user", "a\ud800\x00"), m("assistant", "b")]})
    assert messages[0]["content"] == "a?\x00"


# ----------------------------------------------------------------------------------------------------------------------
# Real files


@needs_data
def test_every_real_file():
    """A real format that is no longer recognised; ids that collide; less than 98% of a format's records converted."""
    good, bad, ids = Counter(), Counter(), Counter()
    for path in sorted(p for p in TRAJECTORIES.rglob("*") if p.is_file()):
        name = path.relative_to(TRAJECTORIES).as_posix()
        for record in chat_records(path, name, "MIT"):
            if isinstance(record, Record):
                good[name.split("/")[0]] += 1
                ids[record.id] += 1
            elif name != "toolverifier/tools.csv":  # names and descriptions of tools, no conversations
                bad[name.split("/")[0]] += 1
    assert max(ids.values()) == 1
    assert {f: n for f, n in good.items() if n / (n + bad[f]) < 0.98} == {}
    assert good == {
        "agentbench_kg": 450, "agentbench_os_train": 500, "fireact": 1500, "glaive": 648, "gorilla_apibench": 179, "intercode": 622,
        "mint_codeact": 12, "react_prompts": 87, "reflexion": 103, "swe_agent": 12, "tau_bench": 188, "toolbench": 119,
        "toolverifier": 555}


# file, number of the record, number of the message, what its brief() line begins and ends with
SPOTS = [
    ("agentbench_kg/kg_rl_all.json", 0, 1, "assistant:  get_relations(variable='m.0zd6') get_neighbors(variable='m.0zd6',",
     "intersection(variable1='#0', variable2='#1') count(variable='#2')"),
    ("agentbench_os_train/training.json", 0, 1, "assistant: To solve",
     "bash(command='find ~/experiment -type f -name \"*.txt\" -mtime -7 | wc -l')"),
    ("fireact/alpaca_format_multitask.json", 5, 3, "assistant: The TV show is House. Now",
     "search(query='TV network that aired House?')"),
    ("fireact/gpt_format_multitask_multimethod.jsonl", 0, 2, "tool: Flowing water finds", ""),
    ("glaive/glaive_toolcall_en_demo.json", 0, 3, "assistant: ",
     "search_recipes(ingredients=['chicken', 'bell peppers', 'rice'])"),
    ("glaive/reason_tool_use_demo_50.jsonl", 1, 2, "assistant: (Alright, the user wants", "get_movie_details(title='Inception')"),
    ("gorilla_apibench/torchhub_train.jsonl", 1, 1, "assistant: Load the pretrained MiDaS",
     "torch.hub.load(repo_or_dir='intel-isl/MiDaS', model='MiDaS_small', pretrained=True)"),
    ("intercode/bash_gpt-3.5_plan_solve_fs4.json", 0, 3, "assistant: Use the `-r` option",
     "bash(command=\"uname -r | cut -d '#' -f 2\")"),
    ("intercode/ctf_gpt-4.json", 0, -2, "assistant: ", "submit(answer='picoCTF{175_chr157m45_85f5d0ac}')"),
    ("intercode/sql_human_multiturn.json", 0, 1, "assistant: ", "sql(query='show tables;')"),
    ("mint_codeact/reasoning_with_tool.txt", 0, 1, "assistant: To solve this problem, let's",
     "python(code=\"print(wikipedia_search('Li Bai'))\")"),
    ("react_prompts/alfworld_3prompts.json", 0, 1, "assistant: To solve the task", "act(command='go to cabinet 1')"),
    ("react_prompts/prompts_naive.json", 0, 3, "assistant: The paragraph does not tell", "Lookup(keyword='named after')"),
    ("reflexion/hotpotqa_react_base_trial1.txt", 0, -1, "tool: Answer is CORRECT", ""),
    ("swe_agent/marshmallow-1867__xml_sys-env_window100.traj", 0, 2, "assistant: Let's first start",
     "bash(command='create reproduce.py')"),
    ("swe_agent/demonstrations__function_calling_simple.traj", 0, 2, "assistant: The `SyntaxError`",
     "find_file(file_name='missing_colon.py')"),
    ("tau_bench/gpt-4o-airline.json", 0, 6, "assistant: ", "get_user_details(user_id='mia_li_3668')"),
    ("tau_bench/MockAirlineDomainEnv-few_shot.jsonl", 0, 3, "user: tool: Error: user not found", ""),
    ("toolbench/answer/G1_answer_11_ChatGPT_DFS_woFilter_w2.json", 0, 5, "assistant: I'm sorry, but I couldn't",
     "transitaires_for_transitaires()"),
    ("toolbench/instruction_G1_query.json", 0, 1, "assistant: Relevant APIs:", "SQUAKE.Checkhealth\nSQUAKE.Projects"),
    ("toolbench/tooleval_gpt35_cot_G1_tool.json", 0, 5, "assistant: To retrieve all the quizzes",
     "quiz_for_moodring(quizid='1')"),
    ("toolverifier/train.csv", 0, 1, "assistant: I recommended the Book Review tool", "Book Review()"),
]


@needs_data
@pytest.mark.parametrize("name, number, message, start, end", SPOTS)
def test_real_spots(name, number, message, start, end):
    """A real record whose call, arguments, thought or role is no longer what a reader of the file finds there."""
    records = [r for r in chat_records(TRAJECTORIES / name, name, "MIT") if isinstance(r, Record)]
    line = brief(records[number].messages)[message]
    assert line.startswith(start) and line.endswith(end)


def test_formats_are_all_covered():
    """A format added without an example."""
    real = {"codeact_text", "react_text", "tooleval", "tau_display", "intercode", "toolverifier", "gorilla",
            "agentbench_os", "agentbench_kg", "alpaca", "swe_agent", "toolbench_query"}  # in SPOTS
    assert set(FORMATS) == real | {form for form, *_ in CASES.values()}


@needs_data
def test_from_the_command_line(tmp_path):
    out = tmp_path / "out"
    run("collect.py", "--out", out, f"chat:{TRAJECTORIES}", "--license", "as stated")
    records, rejected = ([json.loads(line) for shard in sorted(d.glob("*.jsonl")) for line in shard.open()] for d in (out, out / "rejected"))
    assert len(records) == 4975 and len({r["id"] for r in records}) == 4975 and {r["license"] for r in records} == {"as stated"}
    assert sum("tools.csv" not in r["file"] for r in rejected) == 4  # that file lists tools, and no conversations


def test_format_and_domain_from_the_command_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [m("user", "a"), m("assistant", "Hm\n```bash\nls\n```")]}) + "\n")
    run("collect.py", "--out", tmp_path / "out", f"chat:{path}", "--chat-format", "react", "--chat-domain", "instruction")
    [record] = [json.loads(line) for shard in (tmp_path / "out").glob("*.jsonl") for line in shard.open()]
    assert record["domain"] == "instruction" and record["apis"] == ["bash"]


# ----------------------------------------------------------------------------------------------------------------------
# What real files hold that the examples above do not: (record, what it becomes)

ANSWER_OF_CALL = {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]}
ROME_ASKED = {"gen_ai.input.messages": [m("user", "Rome?")]}
UNUSUAL = {
    "an answer that is a call, without content": (
        {"input": [m("user", "Rome?")], "output": ANSWER_OF_CALL}, ["user: Rome?", "assistant:  f()"]),
    "a stream that was cut, with a role that says nothing": (
        {"messages": [m("user", "Rome?")],
         "response": 'data: {"choices": [{"delta": {"role": "", "content": "S"}}]}\n\ndata: {"choices": [{"delta": {"content": "un"}}]}\n\ndata: {"choi'},
        ["user: Rome?", "assistant: Sun"]),
    "more in the tag than the call": (
        {"messages": [m("user", "Rome?"), m("assistant", '<tool_call>\n{"name": "f", "arguments": {}}}\n</tool_call>'), m("tool", "x")]},
        ["user: Rome?", "assistant: } f()", "tool: x"]),
    "text after a tag that nothing closes": (
        {"messages": [m("user", "Rome?"), m("assistant", '<tool_call>\n{"name": "f", "arguments": {}}\nI wait.'), m("tool", "x")]},
        ["user: Rome?", "assistant: I wait. f()", "tool: x"]),
    "Glaive's apostrophes outside its text": (
        {"conversations": [s("human", "Rome?"), s("function_call", """{"name": "f", "arguments": '{"a": "L'A"}'}"""), s("observation", "x"), s("gpt", "Sun")]},
        ["user: Rome?", 'assistant:  f(a="L\'A")', "tool: x", "assistant: Sun"]),
    "harmony's tools that are called while it thinks": (
        "<|start|>user<|message|>Rome?<|end|><|start|>assistant to=python<|channel|>analysis<|message|>print(1)<|call|>"
        "<|start|>python to=assistant<|channel|>analysis<|message|>1<|end|><|start|>assistant<|channel|>final<|message|>Sun<|return|>",
        ["user: Rome?", "assistant:  python(input='print(1)')", "tool: 1", "assistant: Sun"]),
    "a server's tool that printed nothing": (
        {"input": "Rome?", "output": [{"type": "mcp_call", "id": "a", "name": "f", "arguments": "{}", "output": ""}, {"type": "message", "role": "assistant", "content": "Sun"}]},
        ["user: Rome?", "assistant:  f()", "tool: ", "assistant: Sun"]),
    "an interface that found nothing": (
        {"turns": [{"role": "User", "text": "Rome?"}, {"role": "API", "api_name": "f", "param_dict": {}, "result": {"output": [], "exception": None}}]},
        ["user: Rome?", "assistant:  f()", "tool: []"]),
    "OpenHands' command that printed nothing": (
        [{"kind": "MessageEvent", "source": "user", "llm_message": m("user", "Rome?")},
         {"kind": "ActionEvent", "source": "agent", "tool_name": "f", "tool_call_id": "a", "action": {"kind": "F"}},
         {"kind": "ObservationEvent", "source": "environment", "tool_call_id": "a", "observation": {"kind": "F", "output": "", "content": []}}],
        ["user: Rome?", "assistant:  f()", "tool: "]),
    "an empty object for no text": (
        [m("user", "Rome?"), m("assistant", {}, tool_calls=ANSWER_OF_CALL["tool_calls"]), m("tool", {}, tool_call_id="a")],
        ["user: Rome?", "assistant:  f()", "tool: {}"]),
    "a trace that begins with a greeting": (
        [{"start_time": 1, "attributes": {"gen_ai.input.messages": [m("assistant", "Hi!"), m("user", "Rome?")], "gen_ai.output.messages": [m("assistant", "Sun")]}}],
        ["assistant: Hi!", "user: Rome?", "assistant: Sun"]),
    "a trace that ends with a tool that printed nothing": (
        [{"start_time": 1, "attributes": ROME_ASKED | {"gen_ai.output.messages": [ANSWER_OF_CALL]}}, {"start_time": 2, "attributes": {"gen_ai.tool.name": "f", "gen_ai.tool.call.result": ""}}],
        ["user: Rome?", "assistant:  f()", "tool: "]),
    "a trace whose last answer is missing": (
        [{"start_time": 1, "attributes": ROME_ASKED | {"gen_ai.output.messages": [ANSWER_OF_CALL]}}, {"start_time": 2, "attributes": {"gen_ai.tool.name": "f", "gen_ai.tool.call.result": "x"}},
         {"start_time": 3, "attributes": {"gen_ai.input.messages": [m("user", "Rome?"), ANSWER_OF_CALL, {"role": "tool", "content": "x", "tool_call_id": "a"}]}}],
        ["user: Rome?", "assistant:  f()", "tool: x"]),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_records_are_converted(tmp_path, name):
    record, expected = UNUSUAL[name]
    assert brief(converted(tmp_path, record)[0]) == expected


def test_csv_goes_on_after_a_broken_row(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"instruction,output\nA\rB,x\nRome?,Sun\n")
    broken, kept = [value for _, value in read_values(path)]
    assert isinstance(broken, ValueError) and kept == {"instruction": "Rome?", "output": "Sun"}


@pytest.mark.parametrize("text", ['<functioncall> {"name": "a", "arguments": \'', '<tool_call>{\\"a '])
def test_calls_that_nothing_closes_take_linear_time(text):
    messages = [m("user", "x"), m("assistant", text * 4000), m("user", "y")]
    start = time.process_time()
    list(value_records([(0, {"messages": messages})], "x", "MIT"))
    assert time.process_time() - start < 2
