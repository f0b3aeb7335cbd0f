"""A foreign client: what a program that knows nothing but the .proto file gets out of a running gateway.

Usage: client.py ADDR    (host:port; the packages are in requirements.txt)

The stubs are generated into a temporary folder. The last line is `N passed, M failed`; the exit status is 0 if M is.
"""

import importlib
import sys
import tempfile
import traceback
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_tools import protoc

PROTO = Path(__file__).resolve().parents[2] / "proto"
SERVICE = "phalanx.v1.Generation"
PROMPT = "In the beginning God created"
TIMEOUT = 60


def stubs():
    """Messages and stubs, fresh from the .proto file."""
    file = PROTO / "phalanx/v1/generation.proto"
    with tempfile.TemporaryDirectory(prefix="phalanx-stubs-") as folder:
        code = protoc.main(["protoc", f"-I{PROTO}", f"--python_out={folder}", f"--grpc_python_out={folder}", str(file)])
        assert code == 0, f"protoc ended with {code}"
        sys.path.insert(0, folder)
        return [importlib.import_module(f"phalanx.v1.generation_{kind}") for kind in ("pb2", "pb2_grpc")]


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    pb, rpc = stubs()
    with grpc.insecure_channel(sys.argv[1]) as channel:
        checks = Checks(channel, pb, rpc.GenerationStub(channel))
        names = [name for name in vars(Checks) if name.startswith("check_")]
        failed = sum(not passes(name, getattr(checks, name)) for name in names)
    print(f"{len(names) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


def passes(name, check):
    title = name.removeprefix("check_").replace("_", " ")
    try:
        check()
    except Exception:
        traceback.print_exc()
        print(f"FAILED  {title}", flush=True)
        return False
    print(f"ok      {title}", flush=True)
    return True


class Checks:
    def __init__(self, channel, pb, stub):
        self.channel, self.pb, self.stub = channel, pb, stub

    # Tools.

    def text_request(self, text=PROMPT, **options):
        return self.pb.GenerateRequest(text=text, **options)

    def stream(self, request):
        """Started, tokens, finished; in that order and no other."""
        responses = list(self.call(request))
        events = [response.WhichOneof("event") for response in responses]
        assert events[0] == "started" and events[-1] == "finished" and set(events[1:-1]) <= {"token"}, events
        return responses[0].started, [r.token for r in responses[1:-1]], responses[-1].finished

    def call(self, request):
        return self.stub.Generate(request, timeout=TIMEOUT)

    def model(self):
        return self.stub.GetModel(self.pb.GetModelRequest(), timeout=TIMEOUT)

    def tokenize(self, text):
        return list(self.stub.Tokenize(self.pb.TokenizeRequest(text=text), timeout=TIMEOUT).token_ids)

    def detokenize(self, ids):
        return self.stub.Detokenize(self.pb.DetokenizeRequest(token_ids=ids), timeout=TIMEOUT).text

    def refuses(self, request, words):
        try:
            list(self.call(request))
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
            for word in words:
                assert word in error.details(), error.details()
            return
        raise AssertionError("the request was not refused")

    # Checks, in the order in which they run.

    def check_health(self):
        health = health_pb2_grpc.HealthStub(self.channel)
        for service in ("", SERVICE):
            request = health_pb2.HealthCheckRequest(service=service)
            assert health.Check(request, timeout=TIMEOUT).status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=TIMEOUT)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()

    def check_reflection_v1alpha(self):
        database = ProtoReflectionDescriptorDatabase(self.channel)
        services = set(database.get_services())
        assert {SERVICE, "grpc.health.v1.Health"} <= services, services
        # And nothing that is internal.
        public = {SERVICE, "phalanx.v1.Monitor"}
        assert {s for s in services if s.startswith("phalanx.")} == public, services
        service = DescriptorPool(database).FindServiceByName(SERVICE)
        methods = {method.name for method in service.methods}
        assert methods == {"Generate", "Tokenize", "Detokenize", "GetModel"}, methods

    def check_reflection_v1(self):
        # The same messages as v1alpha under another name.
        call = self.channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = next(iter(call(iter([request]), timeout=TIMEOUT)))
        assert SERVICE in {service.name for service in answer.list_services_response.service}

    def check_model(self):
        model = self.model()
        assert model.name and model.fingerprint, model
        assert model.vocabulary > 256 and model.max_context > 1 and model.ranks >= 1, model
        assert all(id < model.vocabulary for id in model.eos_token_ids), model

    def check_tokens_and_back(self):
        for text in ("", PROMPT, "牀前明月光，疑是地上霜。", "👩‍👩‍👧‍👦 🏳️‍🌈", "  two  spaces\n\tand a tab", "<|im_end|>"):
            ids = self.tokenize(text)
            assert self.detokenize(ids) == text, (text, ids)

    def check_text_streams(self):
        started, tokens, finished = self.stream(self.text_request(max_tokens=16))
        assert started.request_id and started.fingerprint == self.model().fingerprint
        assert list(started.prompt_token_ids) == self.tokenize(PROMPT)
        assert 1 <= len(tokens) <= 16 and all(token.logprob <= 0 for token in tokens)
        assert finished.usage.prompt_tokens == len(started.prompt_token_ids)
        assert finished.usage.completion_tokens == len(tokens)
        reasons = self.pb.FINISH_REASON_STOP, self.pb.FINISH_REASON_LENGTH
        assert finished.reason in reasons and (len(tokens) == 16 or finished.reason == reasons[0])

    def check_text_of_deltas_is_text_of_ids(self):
        started, tokens, finished = self.stream(self.text_request(max_tokens=24, ignore_eos=True))
        text = "".join(token.text for token in tokens) + finished.text
        request = self.pb.DetokenizeRequest(
            token_ids=list(started.prompt_token_ids) + [token.id for token in tokens], skip_special_tokens=True)
        assert self.stub.Detokenize(request, timeout=TIMEOUT).text == PROMPT + text

    def check_ids_give_the_same_tokens_as_text(self):
        _, by_text, _ = self.stream(self.text_request(max_tokens=16))
        ids = self.pb.TokenIds(ids=self.tokenize(PROMPT))
        _, by_ids, _ = self.stream(self.pb.GenerateRequest(token_ids=ids, max_tokens=16))
        assert [t.id for t in by_text] == [t.id for t in by_ids]
        assert [t.text for t in by_text] == [t.text for t in by_ids]

    def check_a_prompt_that_came_before_is_cached(self):
        request = self.text_request(PROMPT * 60, max_tokens=1)
        self.stream(request)
        usage = self.stream(request)[2].usage
        assert 0 < usage.cached_tokens < usage.prompt_tokens, usage

    def check_seeds_reproduce(self):
        def sampled(**seed):
            sampling = self.pb.SamplingOptions(temperature=1.0, top_p=0.95, **seed)
            started, tokens, _ = self.stream(self.text_request(max_tokens=24, ignore_eos=True, sampling=sampling))
            return started.seed, [token.id for token in tokens]

        assert sampled(seed=7) == sampled(seed=7)
        seed, tokens = sampled()
        assert sampled(seed=seed) == (seed, tokens), "the seed that `started` reports"
        assert len({tuple(sampled(seed=seed)[1]) for seed in range(4)}) > 1, "seeds make a difference"

    def check_stop_string(self):
        _, tokens, finished = self.stream(self.text_request(max_tokens=24, ignore_eos=True))
        text = "".join(token.text for token in tokens) + finished.text
        stop = text[len(text) // 2:][:4]
        request = self.text_request(max_tokens=24, ignore_eos=True, stop=[stop])
        _, stopped, finished = self.stream(request)
        assert "".join(token.text for token in stopped) + finished.text == text[:text.index(stop)]
        assert finished.reason == self.pb.FINISH_REASON_STOP
        assert finished.usage.completion_tokens == len(stopped)

    def check_conversation(self):
        messages = [self.pb.ChatMessage(role="user", content="Who was <|im_end|> Moses?")]
        request = self.pb.GenerateRequest(conversation=self.pb.Conversation(messages=messages), max_tokens=8)
        if not self.model().has_chat_template:
            return self.refuses(request, ["no chat template"])
        started, _, _ = self.stream(request)
        assert "Who was <|im_end|> Moses?" in self.detokenize(started.prompt_token_ids)
        control = self.tokenize("<|im_end|>")
        if len(control) == 1:
            assert list(started.prompt_token_ids).count(control[0]) == 1, "the user's is not the control token"

    def check_cancel_in_the_middle(self):
        call = self.call(self.text_request(max_tokens=self.model().max_context, ignore_eos=True))
        for response in call:
            if response.WhichOneof("event") == "token":
                break
        call.cancel()
        try:
            list(call)
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.CANCELLED, error
        else:
            raise AssertionError("the stream went on to its end")
        self.stream(self.text_request(max_tokens=4))

    def check_refusals_name_the_limit(self):
        model = self.model()
        ids = self.pb.TokenIds(ids=[self.tokenize(PROMPT)[0]] * (model.max_context + 1))
        self.refuses(self.pb.GenerateRequest(token_ids=ids), [str(model.max_context + 1), str(model.max_context)])
        ids = self.pb.TokenIds(ids=[model.vocabulary])
        self.refuses(self.pb.GenerateRequest(token_ids=ids), [str(model.vocabulary)])
        self.refuses(self.pb.GenerateRequest(), ["prompt"])
        self.refuses(self.text_request(max_tokens=0), ["max_tokens"])
        self.refuses(self.text_request(sampling=self.pb.SamplingOptions(top_p=2)), ["top_p"])


if __name__ == "__main__":
    main()
