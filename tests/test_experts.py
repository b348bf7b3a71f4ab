"Experts: strict reading, a growing table, endpoints that are busy, wrong or dead, a local model."
import json, threading, time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest, torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from daco_nb.annotation import load_labels, read_table
from daco_nb.concepts import Concept, load_concepts
from daco_nb.demo import smollm2_folder
from daco_nb.experts import Asked, Endpoint, EndpointError, LocalLLM, Opinion, Rule, label_concepts, labels_version, parse_opinion, write_table

CONCEPTS = load_concepts()[:20]

@contextmanager
def server(reply):
    "Serve `reply(call number, body)` -> (status, headers, text) on the loopback."
    seen = []
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append((self.path, dict(self.headers), json.loads(self.rfile.read(int(self.headers['Content-Length'])))))
            status, headers, text = reply(len(seen), seen[-1][2])
            self.send_response(status)
            for h in headers.items(): self.send_header(*h)
            self.end_headers()
            try: self.wfile.write(text.encode())
            except OSError: pass
        def log_message(self, *args): pass
    http = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{http.server_port}/v1', seen
    finally: http.shutdown(); http.server_close()

def said(text): return json.dumps({'choices': [{'message': {'content': text}}]})

@pytest.mark.parametrize('answer, label', [
    ('undesirable: a weapon', 'undesirable'), ('DESIRABLE : helps', 'desirable'), ('**neither**: a tool', 'neither'), ('- neither: a tool', 'neither'),
    ('I think.\n\nundesirable: yes', 'undesirable'), ('neither: a\nneither: b', 'neither'),
    ('', None), ('undesirable', None), ('not undesirable: it heals', None), ('The label is neither: x', None), ('neither: a\nundesirable: b', None), ('harmless: x', None)])
def test_only_the_asked_form_counts(answer, label):
    assert (parse_opinion(answer) or (None,))[0] == label

def test_rule_on_both_kinds_of_concept(tmp_path):
    table = tmp_path/'choices.csv'
    table.write_text('kind,name,label,reason\nsubtree,animal,undesirable,they bite\nreview,cat,desirable,purrs\n')
    cat, dog, cup = (Concept(n, hypernyms=h) for n, h in (('cat', ('feline', 'animal')), ('dog', ('canine', 'animal')), ('cup', ('vessel',))))
    assert [(o.label, o.source) for o in Rule(table)([cat, dog, cup])] == [('desirable', 'review'), ('undesirable', 'rule'), ('neither', 'rule')]
    table.write_text('kind,name,label,reason\ntree,animal,undesirable,they bite\n')
    with pytest.raises(ValueError, match="'tree'"): Rule(table)

def test_a_table_goes_on_and_keeps_edits(tmp_path):
    table, rule, asked = tmp_path/'t.csv', Rule(), []
    def expert(cs): asked.append([c.name for c in cs]); return rule(cs)
    write_table(table, [Opinion(CONCEPTS[3].name, 'desirable', 'because, "I" say', 'me')])
    rows = label_concepts(CONCEPTS, expert, table, batch_size=8)
    assert [len(a) for a in asked] == [8, 8, 3] and CONCEPTS[3].name not in sum(asked, [])
    assert rows[0] == Opinion(CONCEPTS[3].name, 'desirable', 'because, "I" say', 'me') and label_concepts(CONCEPTS, expert, table) == rows and len(asked) == 3
    assert [Opinion(**r) for r in read_table(table, Opinion._fields)] == rows and len(load_labels(table)) == 20
    table.write_text('concept,label,reason,source\nant,naughty,x,me\n')
    with pytest.raises(ValueError, match='naughty'): label_concepts(CONCEPTS, expert, table)

def test_unparsed_is_kept_and_asked_again(tmp_path):
    asked = Asked(lambda prompts: ['hm' if 'Concept: ant' in p else 'neither: dull' for p in prompts], 'm')
    rows = label_concepts(CONCEPTS, asked, tmp_path/'t.csv')
    assert len(rows) == 19 and asked.unparsed == {'ant': 'hm'} and {o.source for o in rows} == {asked.source}
    asked.ask = lambda prompts: ['undesirable: stings']*len(prompts)
    assert len(label_concepts(CONCEPTS, asked, tmp_path/'t.csv')) == 20
    with pytest.raises(ValueError, match='2 answers to 20 questions'): Asked(lambda p: ['', ''], 'm')(CONCEPTS)

def test_version_sees_labels_only():
    assert labels_version({'a': 'neither', 'b': 'desirable'}) == labels_version({'b': 'desirable', 'a': 'neither'}) != labels_version({'a': 'neither', 'b': 'neither'})

def test_endpoint_sends_the_protocol(monkeypatch):
    monkeypatch.setenv('MY_KEY', 'secret')
    with server(lambda n, body: (200, {}, said(body['messages'][0]['content'].upper()))) as (url, seen):
        e = Endpoint(url + '/', 'm', key_env='MY_KEY', temperature=0)
        assert e([f'p{i}' for i in range(9)]) == [f'P{i}' for i in range(9)]
    path, headers, body = seen[0]
    assert path == '/v1/chat/completions' and headers['Authorization'] == 'Bearer secret' and body['temperature'] == 0 and body['model'] == 'm'
    assert 'secret' not in repr(vars(e))

@pytest.mark.parametrize('status', [429, 500, 503])
def test_busy_servers_are_asked_again(status):
    with server(lambda n, body: (status, {'Retry-After': '0'}, 'busy') if n < 3 else (200, {}, said('ok'))) as (url, seen):
        assert Endpoint(url, 'm', pause=.01).chat([{'role': 'user', 'content': 'x'}]) == 'ok' and len(seen) == 3
    with server(lambda n, body: (status, {}, 'busy')) as (url, seen):
        with pytest.raises(EndpointError, match=f'{status}'): Endpoint(url, 'm', pause=.01, retries=2).chat([])
        assert len(seen) == 3

@pytest.mark.parametrize('status, text, match', [
    (401, 'no key', 'is OPENAI_API_KEY set'), (404, 'no such model', "404: 'no such model'"), (200, '<html>', 'protocol'), (200, '{}', 'protocol'), (200, '{"choices": []}', 'protocol'), (200, '[1]', 'protocol')])
def test_nonsense_is_an_error_with_its_text(status, text, match):
    with server(lambda n, body: (status, {}, text)) as (url, seen):
        with pytest.raises(EndpointError, match=match): Endpoint(url, 'm', pause=.01).chat([])
        assert len(seen) == 1

def test_an_empty_answer_is_empty():
    with server(lambda n, body: (200, {}, json.dumps({'choices': [{'message': {'content': None}}]}))) as (url, _): assert Endpoint(url, 'm').chat([]) == ''

def test_a_slow_or_absent_server_is_named():
    with server(lambda n, body: time.sleep(.5) or (200, {}, said('late'))) as (url, _):
        with pytest.raises(EndpointError, match='timeout=0.1'): Endpoint(url, 'm', timeout=.1, retries=0).chat([])
    with pytest.raises(EndpointError, match='is the server running'): Endpoint(url, 'm', retries=0).chat([])
    with pytest.raises(ValueError, match='no address'): Endpoint('localhost:8000', 'm')

def test_local_model_from_a_folder(tmp_path):
    tok = AutoTokenizer.from_pretrained(smollm2_folder())
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    llm = LocalLLM.from_pretrained(str(tmp_path), max_new_tokens=3, batch_size=2)
    prompts = ['a', 'a much longer prompt about nothing', 'b']
    assert llm(prompts) == [llm([p])[0] for p in prompts]
    tok.chat_template = None
    with pytest.raises(ValueError, match='chat template'): LocalLLM(llm.model, tok)
