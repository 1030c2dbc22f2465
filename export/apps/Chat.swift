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
    private let first: Int, ends: Set<Int32>, special: [String], tools: String?
    private let context = 2048, most = 256

    init(folder: URL) throws {
        func json(_ name: String) throws -> [String: Any] {
            let data = try Data(contentsOf: folder.appendingPathComponent(name))
            return try JSONSerialization.jsonObject(with: data) as? [String: Any] ?? [:]
        }
        let app = try json("app.json"), added = try json("tokenizer.json")["added_tokens"] as? [[String: Any]] ?? []
        if let system = app["system"] as? String { messages = [["role": "system", "content": system]] }
        first = messages.count
        ends = Set(((app["stop"] as? [String: Any])?["ids"] as? [Int] ?? []).map(Int32.init))
        special = added.filter { $0["special"] as? Bool == true }.compactMap { $0["content"] as? String }
            .sorted { $0.count > $1.count }
        tools = try (app["tools"] as? [Any]).map {
            String(decoding: try JSONSerialization.data(withJSONObject: $0), as: UTF8.self)
        }
        OgaSetTelemetryEnabled(false)
        try check(OgaCreateModel(folder.path, &model))
        try check(OgaCreateTokenizer(model, &tokenizer))
    }

    deinit { OgaDestroyTokenizer(tokenizer); OgaDestroyModel(model) }

    func answer(_ text: String, piece: @Sendable (String) -> Void) throws {
        messages.append(["role": "user", "content": escaped(text)])
        var ids: OpaquePointer?, params: OpaquePointer?, generator: OpaquePointer?, stream: OpaquePointer?
        defer {
            OgaDestroyTokenizerStream(stream); OgaDestroyGenerator(generator)
            OgaDestroyGeneratorParams(params); OgaDestroySequences(ids)
        }
        ids = try encoded()
        while OgaSequencesGetSequenceCount(ids, 0) > context - most && messages.count > first + 2 {
            messages.removeSubrange(first..<first + 2)
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

    /// A user's text, by the rule `escape` of app.json.
    private func escaped(_ text: String) -> String {
        special.reduce(text) { $0.replacingOccurrences(of: $1, with: "\($1.prefix(1)) \($1.dropFirst())") }
    }

    private func encoded() throws -> OpaquePointer? {
        let json = String(decoding: try JSONSerialization.data(withJSONObject: messages), as: UTF8.self)
        var prompt: UnsafePointer<CChar>?, ids: OpaquePointer?
        try check(OgaTokenizerApplyChatTemplate(tokenizer, nil, json, tools, true, &prompt))
        defer { OgaDestroyString(prompt) }
        try check(OgaCreateSequences(&ids))
        try check(OgaTokenizerEncode(tokenizer, prompt, ids))
        return ids
    }
}
