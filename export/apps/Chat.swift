// A conversation with a bundle on iOS: docs/phone_app.md. Never compiled here; names were read in public sources.

import Foundation

struct ChatError: Error { let message: String }

func check(_ result: OpaquePointer?) throws {
    guard let result else { return }
    defer { OgaDestroyResult(result) }
    throw ChatError(message: String(cString: OgaResultGetError(result)))
}

/// One conversation, off the main thread, one answer at a time. Cancel the task to stop one.
actor Chat {
    private var model: OpaquePointer?, tokenizer: OpaquePointer?
    private var messages: [[String: String]] = []
    private let context = 2048, most = 256

    init(folder: URL) throws {
        OgaSetTelemetryEnabled(false)
        try check(OgaCreateModel(folder.path, &model))
        try check(OgaCreateTokenizer(model, &tokenizer))
    }

    deinit { OgaDestroyTokenizer(tokenizer); OgaDestroyModel(model) }

    func answer(_ text: String, piece: @Sendable (String) -> Void) throws {
        messages.append(["role": "user", "content": text])
        var ids: OpaquePointer?, params: OpaquePointer?, generator: OpaquePointer?, stream: OpaquePointer?
        defer {
            OgaDestroyTokenizerStream(stream); OgaDestroyGenerator(generator)
            OgaDestroyGeneratorParams(params); OgaDestroySequences(ids)
        }
        ids = try encoded()
        while OgaSequencesGetSequenceCount(ids, 0) > context - most && messages.count > 2 {
            messages.removeFirst(2)
            OgaDestroySequences(ids)
            ids = nil
            ids = try encoded()
        }
        try check(OgaCreateGeneratorParams(model, &params))
        let length = Double(OgaSequencesGetSequenceCount(ids, 0) + most)
        try check(OgaGeneratorParamsSetSearchNumber(params, "max_length", length))
        try check(OgaGeneratorParamsSetSearchBool(params, "do_sample", false))
        try check(OgaCreateGenerator(model, params, &generator))
        try check(OgaCreateTokenizerStream(tokenizer, &stream))
        var next: UnsafePointer<Int32>?, count = 0, letters: UnsafePointer<CChar>?, said = ""
        try check(OgaTokenizerGetEosTokenIds(tokenizer, &next, &count))
        let ends = Set(UnsafeBufferPointer(start: next, count: count))
        try check(OgaGenerator_AppendTokenSequences(generator, ids))
        while !OgaGenerator_IsDone(generator) && !Task.isCancelled {
            try check(OgaGenerator_GenerateNextToken(generator))
            try check(OgaGenerator_GetNextTokens(generator, &next, &count))
            guard let token = next?.pointee, !ends.contains(token) else { continue }
            try check(OgaTokenizerStreamDecode(stream, token, &letters)) // letters belong to the stream
            if let letters { said += String(cString: letters); piece(String(cString: letters)) }
        }
        messages.append(["role": "assistant", "content": said])
    }

    private func encoded() throws -> OpaquePointer? {
        let json = String(decoding: try JSONSerialization.data(withJSONObject: messages), as: UTF8.self)
        var prompt: UnsafePointer<CChar>?, ids: OpaquePointer?
        try check(OgaTokenizerApplyChatTemplate(tokenizer, nil, json, nil, true, &prompt))
        defer { OgaDestroyString(prompt) }
        try check(OgaCreateSequences(&ids))
        try check(OgaTokenizerEncode(tokenizer, prompt, ids))
        return ids
    }
}
